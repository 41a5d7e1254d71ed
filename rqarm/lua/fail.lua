-- fail: the attempt ends without a result, for good: with a record for a while, or set aside for somebody to look at.
--
-- FLAGS allow-oom
-- KEYS status          hash   state, token, ...
-- ARGV prefix          str    of every key of ours
-- ARGV key             str    the request's key
-- ARGV token           str    fencing token given at start
-- ARGV error           bytes  packed: type, message, traceback
-- ARGV failure_ttl_ms  int    how long the record can be inspected when it is not set aside
-- ARGV negative_ms     int    how long the error answers the same request; 0 = not at all
-- ARGV reason          str    why it is set aside; '' = it is not
-- ARGV note            bytes  packed: what else is known of it, for who finds it set aside
-- ARGV keep            int    requests set aside at the most
-- ARGV follow_ups      bytes  of who is told: kind, key, identity, request, job id, RQ's commands, data; to the end
--
-- Returns {'failed'} | {'already'} | {'lost', state}

local status = KEYS[1]
local key, token, err = ARGV[2], ARGV[3], ARGV[4]
local failure_ttl_ms, negative_ms = tonumber(ARGV[5]), tonumber(ARGV[6])
local reason, note, keep = ARGV[7], ARGV[8], tonumber(ARGV[9])
local follow_ups = {unpack(ARGV, 10)}

local claim = record(key, 'state', 'token', 'done_token', 'queue', 'priority', 'slot', 'est_ms', 'limit', 'started_ms',
  'pushed_ms', 'emitted', 'trace', 'traced', 'attempts', 'worker')

if claim.state == 'failed' and claim.done_token == token then return {'already'} end
if claim.state ~= 'in_progress' or claim.token ~= token then
  count_refusal(claim, token)
  return {'lost', claim.state or 'unknown'}
end

local negative_until = negative_ms > 0 and int(now_ms + negative_ms) or nil
if reason ~= '' then
  set_aside(key, claim, err, reason, note, negative_until)
  -- Two, so that what is too many already becomes less.
  trim_quarantine(keep, 2)
else
  land(key, claim)
  redis.call('HSET', status, 'state', 'failed', 'ended_ms', int(now_ms), 'error', err)
  -- The record outlives its negative answer, whichever of the two is longer.
  redis.call('PEXPIRE', status, int(math.max(failure_ttl_ms, negative_ms)))
  redis.call('PEXPIRE', callbacks_name(key), int(failure_ttl_ms))
  redis.call('PEXPIRE', followup_name(key), int(failure_ttl_ms))
  if claim.emitted then redis.call('PEXPIRE', emitted_name(key), int(math.max(failure_ttl_ms, negative_ms))) end
  list_ended(key, 'failed')
  wake(key, 'failed')
  end_all_led_by(key, 'failed', err, negative_until)
end
redis.call('HSET', status, 'done_token', token)
note_attempt(key, claim, 'failed', err)
-- Of what is set aside a copy of the payloads: they are for the end of its next run.
if follow_ups[1] then follow(key, follow_ups, claim, reason ~= '', {'error', err}) end
if negative_until then redis.call('HSET', status, 'negative_until', negative_until) end
count_end('failed', claim)
event('fail', key, 'failed')
return {'failed'}
