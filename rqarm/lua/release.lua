-- release: hand an attempt back unharmed (a deploy, a shutdown). It counts neither as attempt nor as crash and keeps
-- its place in line.
--
-- FLAGS allow-oom
-- KEYS status    hash   state, token, ...
-- ARGV prefix    str    of every key of ours
-- ARGV key       str    the request's key
-- ARGV token     str    fencing token given at start
-- ARGV job_id    str    the new ticket; the same one again answers 'already'
-- ARGV commands  str    RQ's own commands that queue it, at the front
-- ARGV data      bytes  what is not text in them
-- ARGV job       str    RQ's job hash of the old ticket, to delete; '' = an RQ worker does that
--
-- Returns {'released'} | {'already'} | {'lost', state}

local status = KEYS[1]
local key, token, job_id, commands, data, job = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]

local claim = record(key, 'state', 'token', 'job_id', 'queue', 'priority', 'ticket', 'slot', 'est_ms', 'limit')

if claim.job_id == job_id then return {'already'} end
if claim.state ~= 'in_progress' or claim.token ~= token then
  count_refusal(claim, token)
  return {'lost', claim.state or 'unknown'}
end

requeue(key, claim, job_id, commands, data, job)
redis.call('HINCRBY', status, 'attempts', -1)
count('executions', 'released')
event('release', key, 'pending')
return {'released'}
