-- crash: an attempt died without a word. Run it again, or set it aside when it has killed its last worker.
--
-- Called at once by the parent of the dead process, which holds the token, and by the sweep for lapsed leases, which
-- does not: then the lease must have lapsed on the server's clock.
--
-- FLAGS allow-oom
-- KEYS status        hash   state, token, lease_until, crashes
-- ARGV prefix        str    of every key of ours
-- ARGV key           str    the request's key
-- ARGV token         str    fencing token; '' = by the clock
-- ARGV job_id        str    the new ticket; the same one again answers 'already'
-- ARGV commands      str    RQ's own commands that queue or schedule it
-- ARGV data          bytes  what is not text in them
-- ARGV delay_ms      int    0 = at once
-- ARGV max_attempts  int    crashes after which it is set aside
-- ARGV error         bytes  packed: what is known of the death
-- ARGV note          bytes  packed: what else is known of the request, for who finds it set aside
--
-- Returns {'requeued', crashes} | {'quarantined', crashes} | {'already'} | {'alive', state}

local status = KEYS[1]
local key, token, job_id, commands, data = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local delay_ms, max_attempts, err, note = tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[9], ARGV[10]

local claim = record(key, 'state', 'token', 'job_id', 'queue', 'priority', 'ticket', 'slot', 'est_ms', 'crashes',
  'lease_until', 'aside_by', 'limit', 'attempts', 'worker', 'started_ms')

-- A quarantined request keeps its last ticket, which is what `rq requeue` delivers; the one offered is noted beside it.
if claim.job_id == job_id or claim.aside_by == job_id then return {'already'} end
local dead = token ~= '' and claim.token == token
  or token == '' and (tonumber(claim.lease_until) or now_ms) <= now_ms
if claim.state ~= 'in_progress' or not dead then return {'alive', claim.state or 'unknown'} end

local crashes = redis.call('HINCRBY', status, 'crashes', 1)
note_attempt(key, claim, 'crashed', err)
local outcome
if crashes >= max_attempts then
  set_aside(key, claim, err, 'poison', note)
  redis.call('HSET', status, 'aside_by', job_id)
  outcome = 'quarantined'
else
  requeue(key, claim, job_id, commands, data)
  redis.call('HSET', status, 'error', err)
  if delay_ms > 0 then redis.call('HSET', status, 'due_ms', int(now_ms + delay_ms)) end
  outcome = 'requeued'
end
count('executions', 'crashed')
event('crash', key, outcome == 'requeued' and 'pending' or 'failed')
return {outcome, crashes}
