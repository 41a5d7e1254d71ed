-- take: pop the next ticket of the lists and start it, in one step: nothing is lost between the two. The pull interface
-- and rqarm.Worker.
--
-- A job that is not ours stays where it is, and so does what stands behind it: it belongs to an RQ worker. When that is
-- who asks, `suspended` is given: then such a job is its next one, and the RQ job of what is started is kept for RQ's
-- tools until it ends.
--
-- FLAGS allow-oom
-- KEYS leases      zset  key by deadline
-- ARGV prefix      str   of every key of ours
-- ARGV exec        str   made by the caller; the same one again gets the same token
-- ARGV taker       str   who asks; one that asks twice at a time must use two names
-- ARGV worker      str   name of the worker, for the record
-- ARGV lease_ms    int   how long a silent taker keeps it
-- ARGV job_prefix  str   of RQ's job hashes
-- ARGV suspended   str   name of RQ's flag that suspends workers; '' = the pull interface
-- ARGV is_last     0|1   this `exec` starts nothing from now on, though a call that was sent before may come yet
-- ARGV lists       str   RQ's lists in their order, to the end; none: only what this `exec` has started before
--
-- Returns {'started', key, list, left, token, attempt, request, kwargs, retries, crashes, queue, priority, job_id,
--   pushed_ms, started_ms, uri, uri_2, uri_3, trace} | {'empty', last_event} | {'foreign', list} | {'suspended'} | {'spent'}
-- Returns also: list is '' when this `exec` had started it before; left is how many wait in its queue still; spent:
--   that has ended, or a later one of its taker has started. An `exec` starts once.

local leases = KEYS[1]
local prefix, exec, taker, worker, lease_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local job_prefix, suspended, is_last, lists = ARGV[6], ARGV[7], ARGV[8], {unpack(ARGV, 9)}
local is_worker = suspended ~= ''

-- Superseded tickets that are thrown away in one step, at the most.
local LOOKED_AT = 100

-- The key in front of the eight hex digits of a ticket.
local function key_of(job_id)
  return string.match(job_id, '^([%w_-]+)%-%x%x%x%x%x%x%x%x$')
end

-- Whether a job whose request has no record is ours: RQ stores the call as plain JSON. Such a ticket is left behind by a
-- request that was cancelled and then forgotten; nobody else would take it out of the way.
local function is_ours(job_id)
  local data = redis.call('HGET', job_prefix .. job_id, 'data')
  return data and string.find(data, 'rqarm.worker.perform", null, ["' .. string.sub(prefix, 1, -2) .. '"', 1, true)
end

-- What was started, or the foreign job in the way.
local function next_ticket(list)
  for _ = 1, LOOKED_AT do
    local job_id = redis.call('LINDEX', list, 0)
    if not job_id then return nil end
    local key = key_of(job_id)
    if not key then return nil, job_id end
    -- What somebody else wrote under the record's name must not stop the queue: RQ's own way fails such a job.
    local claim, values = {}, redis.pcall('HMGET', status_name(key), unpack(BEFORE))
    if values.err then return nil, job_id end
    for i, name in ipairs(BEFORE) do claim[name] = values[i] end
    if not claim.state and redis.call('EXISTS', job_prefix .. job_id) == 1 and not is_ours(job_id) then
      return nil, job_id
    end
    redis.call('LPOP', list)
    -- The ticket of a failed request: that is what `rq requeue` means.
    local is_again = claim.state == 'failed' and claim.job_id == job_id
    local is_next = claim.state == 'pending' and claim.job_id == job_id and not claim.alias or is_again
    -- A second ticket of what an RQ worker runs: the job is still that worker's.
    local is_running = claim.state == 'in_progress' and claim.job_id == job_id
    if not is_running and not (is_next and is_worker) then redis.call('DEL', job_prefix .. job_id) end
    if is_next then
      if is_again then
        -- RARE
        revoke_failure(key, claim)
        -- /RARE
      end
      begin(key, claim, exec, worker, lease_ms)
      redis.call('HSET', takers_name(), taker, exec .. ' ' .. key)
      claim.key = key
      return claim
    end
  end
end

-- What this taker took last: a call that is sent again, because its reply was lost, gets the same key. No key has a dot.
local NOTHING = '.'

-- Executions `name.number` of one taker rise. One that waited behind an empty list may come when later ones have started.
local function is_older(one, other)
  local name, number = string.match(one, '^(.*)%.(%d+)$')
  local same, last = string.match(other or '', '^(.*)%.(%d+)$')
  return name and name == same and tonumber(number) < tonumber(last)
end

local taken, from, foreign, is_spent
local last_exec, last_key = string.match(redis.call('HGET', takers_name(), taker) or '', '^(%S+) (%S+)$')
if last_exec == exec then
  local last = record(last_key, unpack(BEFORE))
  if last.exec == exec then taken, from, last.key = last, '', last_key end
  is_spent = not taken
elseif is_older(exec, last_exec) then
  is_spent = true
elseif is_last == '1' then
  redis.call('HSET', takers_name(), taker, exec .. ' ' .. NOTHING)
end

local is_suspended = is_worker and not taken and redis.call('EXISTS', suspended) == 1
for _, list in ipairs((is_suspended or is_spent) and {} or lists) do
  if taken or foreign then break end
  taken, foreign = next_ticket(list)
  foreign, from = is_worker and foreign, list
end

if taken then return {'started', taken.key, from, int(taken.left or 0), attempt(taken)} end
if is_spent then return {'spent'} end
if is_suspended then return {'suspended'} end
if foreign then return {'foreign', from} end
local newest = redis.call('XREVRANGE', events_name(), '+', '-', 'COUNT', 1)
return {'empty', newest[1] and newest[1][1] or '0-0'}
