-- take: pop the next ticket of a queue and start it, in one step: nothing is lost between the two. The pull interface.
--
-- A job that is not ours stays where it is, and so does what stands behind it: it belongs to an RQ worker.
--
-- FLAGS allow-oom
-- KEYS pending     zset  line of the queue
-- ARGV prefix      str   of every key of ours
-- ARGV exec        str   made by the caller; the same one again gets the same token
-- ARGV worker      str   name of the taker
-- ARGV lease_ms    int   how long a silent taker keeps it
-- ARGV job_prefix  str   of RQ's job hashes
-- ARGV lists       str   RQ's lists: high, default, low, to the end
--
-- Returns {'started', key, token, attempt, request, kwargs, retries, crashes, queue, priority}
-- Returns {'empty', last_event}

local pending = KEYS[1]
local prefix, exec, worker, lease_ms, job_prefix = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local lists = {unpack(ARGV, 6)}

-- Superseded tickets that are thrown away in one step, at the most.
local LOOKED_AT = 100

-- The key in front of the eight hex digits of a ticket.
local function key_of(job_id)
  return string.match(job_id, '^([%w_-]+)%-%x%x%x%x%x%x%x%x$')
end

-- Whether a job whose request has no record is ours: RQ stores the arguments, namespace and key, as plain JSON. Such a
-- ticket is left behind by a request that was cancelled and then forgotten; nobody else would take it out of the way.
local function is_ours(job_id, key)
  local data = redis.call('HGET', job_prefix .. job_id, 'data')
  return data and string.find(data, '["' .. string.sub(prefix, 1, -2) .. '", "' .. key .. '"]', 1, true)
end

local function next_ticket(list)
  for _ = 1, LOOKED_AT do
    local job_id = redis.call('LINDEX', list, 0)
    local key = job_id and key_of(job_id)
    if not key then return nil end
    local claim = record(key, 'state', 'job_id', 'queue', 'slot', 'est_ms')
    local is_job = redis.call('EXISTS', job_prefix .. job_id) == 1
    if not claim.state and is_job and not is_ours(job_id, key) then return nil end
    redis.call('LPOP', list)
    -- A second ticket of what an RQ worker runs: the job is still that worker's.
    local is_running = claim.state == 'in_progress' and claim.job_id == job_id
    if not is_running then redis.call('DEL', job_prefix .. job_id) end
    if claim.state == 'pending' and claim.job_id == job_id then
      begin(key, claim, job_id, exec, worker, lease_ms)
      return key
    end
  end
end

-- What this worker took last: a call that is sent again, because its reply was lost, gets the same key.
local taken
local last_exec, last_key = string.match(redis.call('HGET', takers_name(), worker) or '', '^(%S+) (%S+)$')
if last_exec == exec and redis.call('HGET', status_name(last_key), 'exec') == exec then taken = last_key end
for _, list in ipairs(lists) do taken = taken or next_ticket(list) end

if taken then redis.call('HSET', takers_name(), worker, exec .. ' ' .. taken) end
if taken then return {'started', taken, attempt(taken)} end
local newest = redis.call('XREVRANGE', events_name(), '+', '-', 'COUNT', 1)
return {'empty', newest[1] and newest[1][1] or '0-0'}
