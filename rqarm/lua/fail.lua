-- fail: the attempt ends without a result, for good.
--
-- FLAGS allow-oom
-- KEYS status          hash   state, token, ...
-- ARGV prefix          str    of every key of ours
-- ARGV key             str    the request's key
-- ARGV token           str    fencing token given at start
-- ARGV error           bytes  packed: type, message, traceback
-- ARGV failure_ttl_ms  int    how long the record can be inspected
-- ARGV negative_ms     int    how long the error answers the same request; 0 = not at all
--
-- Returns {'failed'} | {'already'} | {'lost', state}

local status = KEYS[1]
local key, token, err = ARGV[2], ARGV[3], ARGV[4]
local failure_ttl_ms, negative_ms = tonumber(ARGV[5]), tonumber(ARGV[6])

local claim = record(key, 'state', 'token', 'done_token', 'queue', 'slot', 'est_ms', 'limit')

if claim.state == 'failed' and claim.done_token == token then return {'already'} end
if claim.state ~= 'in_progress' or claim.token ~= token then return {'lost', claim.state or 'unknown'} end

land(key, claim)
redis.call('HSET', status, 'state', 'failed', 'ended_ms', int(now_ms), 'error', err, 'done_token', token)
if negative_ms > 0 then redis.call('HSET', status, 'negative_until', int(now_ms + negative_ms)) end
-- The record outlives its negative answer, whichever of the two is longer.
redis.call('PEXPIRE', status, int(math.max(failure_ttl_ms, negative_ms)))
redis.call('PEXPIRE', callbacks_name(key), int(failure_ttl_ms))
wake(key, 'failed')
end_all_led_by(key, 'failed', err, negative_ms > 0 and int(now_ms + negative_ms) or nil)
count('executions', 'failed')
event('fail', key, 'failed')
return {'failed'}
