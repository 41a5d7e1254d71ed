-- revive: a pending request lost its ticket (queue emptied, job deleted, popped and dropped), or its redirect leads nowhere
-- any more. Give it a new one.
--
-- FLAGS allow-oom
-- KEYS status      hash   state, job_id
-- ARGV prefix      str    of every key of ours
-- ARGV key         str    the request's key
-- ARGV old_job_id  str    the ticket that the sweep did not find
-- ARGV job_id      str    the new ticket; the same one again answers 'already'
-- ARGV commands    str    RQ's own commands that queue it
-- ARGV data        bytes  what is not text in them
--
-- Returns {'revived'} | {'already'} | {'alive', state}

local key, old_job_id, job_id, commands, data = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local status = KEYS[1]

local claim = record(key, 'state', 'job_id', 'queue', 'priority', 'ticket', 'slot', 'est_ms', 'limit', 'alias')

if claim.job_id == job_id then return {'already'} end
if claim.state ~= 'pending' or claim.job_id ~= old_job_id then return {'alive', claim.state or 'unknown'} end
if claim.alias and is_led(claim) then return {'alive', claim.state} end

if claim.alias then break_away(key, claim.alias) end
requeue(key, claim, job_id, commands, data)
redis.call('HDEL', status, 'due_ms')
count('executions', 'revived')
event('revive', key, 'pending')
return {'revived'}
