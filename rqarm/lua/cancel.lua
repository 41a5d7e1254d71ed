-- cancel: end a request that nobody wants any more, also for those who joined it. A running attempt finds at its next
-- renewal that it has lost; a ticket that is still queued finds itself superseded.
--
-- FLAGS allow-oom
-- KEYS status          hash   state, ...
-- ARGV prefix          str    of every key of ours
-- ARGV key             str    the request's key
-- ARGV failure_ttl_ms  int    how long the record can be inspected
--
-- Returns {'cancelled', state} | {'ended', state} | {'unknown'}

local status = KEYS[1]
local key, failure_ttl_ms = ARGV[2], ARGV[3]

local claim = record(key, 'state', 'queue', 'slot', 'est_ms', 'limit', 'emitted', 'alias')

if not claim.state then return {'unknown'} end
if claim.state ~= 'pending' and claim.state ~= 'in_progress' then return {'ended', claim.state} end

if claim.alias then break_away(key, claim.alias) end
land(key, claim)
redis.call('HSET', status, 'state', 'cancelled', 'ended_ms', int(now_ms))
redis.call('PEXPIRE', status, failure_ttl_ms)
if claim.emitted then redis.call('PEXPIRE', emitted_name(key), failure_ttl_ms) end
redis.call('UNLINK', callbacks_name(key), followup_name(key))
wake(key, 'cancelled')
end_all_led_by(key, 'cancelled')
list_ended(key, 'cancelled')
count('executions', 'cancelled')
event('cancel', key, 'cancelled')
return {'cancelled', claim.state}
