-- start: one delivery ticket becomes one execution, with a fencing token of its own.
--
-- A ticket that is not the claim's current one is superseded: duplicates and old deliveries are harmless. The ticket
-- of a failed request starts it anew: that is what `rq requeue` means. It is not what a caller means who starts his own.
--
-- FLAGS allow-oom
-- KEYS status    hash   state, job_id, ...
-- ARGV prefix    str    of every key of ours
-- ARGV key       str    the request's key
-- ARGV job_id    str    the delivery ticket
-- ARGV exec      str    made by the caller; the same one again gets the same token
-- ARGV worker    str    name of the worker
-- ARGV lease_ms  int    how long a silent worker keeps it
-- ARGV list      str    RQ's list that the ticket stands in, for who is no RQ worker and takes it out of there; '' = popped
-- ARGV job       str    RQ's job hash, deleted with it
--
-- Returns {'started', token, attempt, request, kwargs, retries, crashes, queue, priority, job_id, pushed_ms, started_ms,
--   uri, uri_2, uri_3}
-- Returns {'superseded', state} | {'unknown'}

local status = KEYS[1]
local key, job_id, exec, worker, lease_ms = ARGV[2], ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
local list, job = ARGV[7], ARGV[8]

local claim = record(key, unpack(BEFORE))
local state = claim.state

local outcome
if not state then
  outcome = 'unknown'
elseif state == 'in_progress' and claim.exec == exec then
  outcome = 'started'
elseif state == 'pending' and claim.job_id == job_id and not claim.alias then
  begin(key, claim, exec, worker, lease_ms)
  -- Who is not in the list was popped by an RQ worker: it finds its ticket superseded and ends the job itself.
  if list ~= '' and redis.call('LREM', list, -1, job_id) > 0 then redis.call('DEL', job) end
  outcome = 'started'
elseif state == 'failed' and claim.job_id == job_id and list == '' then
  revoke_failure(key, claim)
  begin(key, claim, exec, worker, lease_ms)
  outcome = 'started'
else
  outcome = 'superseded'
end

if outcome ~= 'started' then return {outcome, state} end
return {outcome, attempt(claim)}
