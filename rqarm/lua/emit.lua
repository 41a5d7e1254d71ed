-- emit: keep an intermediate response of an attempt, and wake those who follow. Only the holder of the token may.
--
-- What is kept has no gaps. A number that is not the next one means that those between were lost on their way, or that the
-- list was evicted: then what came before goes too. No allow-oom: when memory is out it is refused at its first write.
--
-- KEYS status     hash   state, token, emitted
-- ARGV prefix     str    of every key of ours
-- ARGV key        str    the request's key
-- ARGV token      str    fencing token given at start
-- ARGV number     int    1 = the first of the attempt; the same one again answers 'already'
-- ARGV max_items  int    kept at the most; the oldest go first
-- ARGV max_bytes  int    of all that are kept
-- ARGV value      bytes  what is emitted
--
-- Returns {'emitted'} | {'already'} | {'lost', state}

local status = KEYS[1]
local key, token, number = ARGV[2], ARGV[3], tonumber(ARGV[4])
local max_items, max_bytes, value = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]

local claim = record(key, 'state', 'token', 'emitted')

if claim.state ~= 'in_progress' or claim.token ~= token then return {'lost', claim.state or 'unknown'} end
local first, count, bytes = kept_emissions(key, claim.emitted)
if number < first + count then return {'already'} end

local emitted = emitted_name(key)
redis.call('RPUSH', emitted, value)
if count > 0 and number == first + count then
  redis.call('LPOP', emitted)
else
  redis.call('LTRIM', emitted, -1, -1)
  redis.call('PERSIST', emitted)
  redis.call('HSET', status, 'emitted', token)
  first, count, bytes = number, 0, 0
end
count, bytes = count + 1, bytes + #value
while count > 1 and (count > max_items or bytes > max_bytes) do
  bytes = bytes - #redis.call('LPOP', emitted)
  first, count = first + 1, count - 1
end
redis.call('LPUSH', emitted, token .. ':' .. int(first) .. ':' .. int(bytes))
redis.call('PUBLISH', told_name(key), 'emit')
return {'emitted'}
