-- requeue: a request that was set aside runs again, behind a new ticket at the end of its line. Its payloads and the
-- arguments that a retry changed stay; crashes, retries and the error are forgotten.
--
-- No allow-oom here: the first write is refused when memory is out.
--
-- KEYS status      hash   state, quarantined, job_id, ...
-- ARGV prefix      str    of every key of ours
-- ARGV key         str    the request's key
-- ARGV old_job_id  str    the last ticket, as the caller saw it
-- ARGV job_id      str    the new ticket; the same one again answers 'already'
-- ARGV commands    str    RQ's own commands that queue it
-- ARGV data        bytes  what is not text in them
-- ARGV dismissal   str    RQ's own commands that delete the failed job of the last ticket
--
-- Returns {'requeued'} | {'already'} | {'superseded', state} | {'in_flight', state} | {'ended', state} | {'unknown'}
-- Returns also: superseded = it was set aside again since, look again; ended = it is not set aside.

local status = KEYS[1]
local key, old_job_id, job_id, commands, data = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local dismissal = ARGV[7]

local claim = record(key, 'state', 'quarantined', 'job_id', 'queue', 'priority', 'est_ms')

if not claim.state then return {'unknown'} end
if claim.job_id == job_id then return {'already'} end
if claim.state == 'pending' or claim.state == 'in_progress' then return {'in_flight', claim.state} end
if claim.state ~= 'failed' or not claim.quarantined then return {'ended', claim.state} end
if claim.job_id ~= old_job_id then return {'superseded', claim.state} end

claim.ticket = next_seq()
redis.call('PERSIST', status)
redis.call('PERSIST', callbacks_name(key))
redis.call('HSET', status, 'ticket', int(claim.ticket))
redis.call('HDEL', status, 'ended_ms', 'due_ms')
revoke_failure(key, claim)
requeue(key, claim, job_id, commands, data)
dismiss(dismissal)
count('decisions', 'requeued')
event('requeue', key, 'pending')
return {'requeued'}
