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

local known = record(key, 'state', 'alias')
local state, holder = known.state, known.alias or key

if not state then return {'unknown'} end
if state ~= 'completed' or redis.call('EXISTS', result_name(holder)) == 0 then return {'no_result', state} end

-- The result is that of the root, with which its aliases live.
local is_change = ttl_ms > 0 or redis.call('PTTL', result_name(holder)) >= 0
redis.call('HSET', status_name(holder), 'sticky', ttl_ms == 0 and '1' or '0')
set_deadline(holder, ttl_ms > 0 and now_ms + ttl_ms or nil)
if is_change then event('retain', key, state) end
return {'retained', state}
