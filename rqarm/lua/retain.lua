-- retain: say anew how long a stored result lives, from now on; also shorter than before.
--
-- FLAGS allow-oom
-- KEYS status  hash  state, sticky
-- ARGV prefix  str   of every key of ours
-- ARGV key     str   the request's key
-- ARGV ttl_ms  int   0 = sticky
--
-- Returns {'retained', state} | {'no_result', state} | {'unknown'}

local status = KEYS[1]
local key, ttl_ms = ARGV[2], tonumber(ARGV[3])

local state = redis.call('HGET', status, 'state')

if not state then return {'unknown'} end
if state ~= 'completed' or redis.call('EXISTS', result_name(key)) == 0 then return {'no_result', state} end

local is_change = ttl_ms > 0 or redis.call('PTTL', result_name(key)) >= 0
redis.call('HSET', status, 'sticky', ttl_ms == 0 and '1' or '0')
set_deadline(key, ttl_ms > 0 and now_ms + ttl_ms or nil)
if is_change then event('retain', key, state) end
return {'retained', state}
