-- retry: the attempt failed, the request stays claimed and runs again behind a new ticket.
--
-- FLAGS allow-oom
-- KEYS status    hash   state, token, ...
-- ARGV prefix    str    of every key of ours
-- ARGV key       str    the request's key
-- ARGV token     str    fencing token given at start
-- ARGV job_id    str    the new ticket; the same one again answers 'already'
-- ARGV commands  str    RQ's own commands that queue or schedule it
-- ARGV data      bytes  what is not text in them
-- ARGV delay_ms  int    0 = at once
-- ARGV kwargs    bytes  keyword arguments of the next attempt; '' = unchanged
-- ARGV error     bytes  packed: why this attempt ended
-- ARGV job       str    RQ's job hash of the old ticket, to delete; '' = an RQ worker does that
--
-- Returns {'retried'} | {'already'} | {'lost', state}

local status = KEYS[1]
local key, token, job_id, commands, data = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local delay_ms, kwargs, err, job = tonumber(ARGV[7]), ARGV[8], ARGV[9], ARGV[10]

local claim = record(key, 'state', 'token', 'job_id', 'queue', 'priority', 'ticket', 'slot', 'est_ms', 'limit',
  'attempts', 'worker', 'started_ms')

if claim.job_id == job_id then return {'already'} end
if claim.state ~= 'in_progress' or claim.token ~= token then
  count_refusal(claim, token)
  return {'lost', claim.state or 'unknown'}
end

requeue(key, claim, job_id, commands, data, job)
redis.call('HINCRBY', status, 'retries', 1)
redis.call('HSET', status, 'error', err)
note_attempt(key, claim, 'retried', err)
if kwargs ~= '' then redis.call('HSET', status, 'kwargs', kwargs) end
if delay_ms > 0 then redis.call('HSET', status, 'due_ms', int(now_ms + delay_ms)) end
count('executions', 'retried')
event('retry', key, 'pending')
return {'retried'}
