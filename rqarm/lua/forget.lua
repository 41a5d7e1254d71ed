-- forget: drop a request that has ended, with its result. What is in flight must be cancelled first.
--
-- FLAGS allow-oom
-- KEYS status  hash  state
-- ARGV prefix  str   of every key of ours
-- ARGV key     str   the request's key
--
-- Returns {'forgotten', state} | {'in_flight', state} | {'unknown'}

local status = KEYS[1]
local key = ARGV[2]

local state = redis.call('HGET', status, 'state')

if not state then return {'unknown'} end
if state == 'pending' or state == 'in_progress' then return {'in_flight', state} end

drop_result(key, 'cleared')
erase(key)
readmit(key)
wake(key, 'unknown')
event('forget', key, 'unknown')
return {'forgotten', state}
