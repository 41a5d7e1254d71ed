-- discard: drop a request that was set aside, with its payloads. What is in flight must be cancelled first.
--
-- FLAGS allow-oom
-- KEYS status      hash   state, quarantined, job_id
-- ARGV prefix      str    of every key of ours
-- ARGV key         str    the request's key
-- ARGV old_job_id  str    the last ticket, as the caller saw it
-- ARGV dismissal   str    RQ's own commands that delete the failed job of the last ticket
--
-- Returns {'discarded'} | {'superseded', state} | {'in_flight', state} | {'ended', state} | {'unknown'}
-- Returns also: superseded = it was set aside again since, look again; ended = it is not set aside.

local status = KEYS[1]
local key, old_job_id, dismissal = ARGV[2], ARGV[3], ARGV[4]

local claim = record(key, 'state', 'quarantined', 'job_id')

if not claim.state then return {'unknown'} end
if claim.state == 'pending' or claim.state == 'in_progress' then return {'in_flight', claim.state} end
if claim.state ~= 'failed' or not claim.quarantined then return {'ended', claim.state} end
if claim.job_id ~= old_job_id then return {'superseded', claim.state} end

erase(key)
readmit(key)
dismiss(dismissal)
wake(key, 'unknown')
count('decisions', 'discarded')
event('discard', key, 'unknown')
return {'discarded'}
