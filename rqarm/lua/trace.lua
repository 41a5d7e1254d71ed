-- trace: tell the trace context of an execution that is about to end, and get those of who has joined it.
--
-- KEYS status   hash   state, token, ...
-- ARGV prefix   str    of every key of ours
-- ARGV key      str    the request's key
-- ARGV token    str    fencing token given at start
-- ARGV context  str    traceparent of the span of the execution
--
-- Returns {'traced', contexts} | {'lost', state}

local status = KEYS[1]
local key, token, context = ARGV[2], ARGV[3], ARGV[4]

local claim = record(key, 'state', 'token', 'attempts', 'submitted_ms')
if claim.state ~= 'in_progress' or claim.token ~= token then return {'lost', claim.state or 'unknown'} end

redis.call('HSET', status, 'traced', claim.attempts .. ':' .. context)
local contexts, mine = {}, claim.submitted_ms .. ' '
for _, entry in ipairs(redis.call('SMEMBERS', traces_name(key))) do
  if string.sub(entry, 1, #mine) == mine then contexts[#contexts + 1] = string.sub(entry, #mine + 1) end
end
return {'traced', contexts}
