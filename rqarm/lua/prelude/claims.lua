-- A claim on its way: entered, begun, put back, landed.

-- A claim is written: the record, its place in line, RQ's job.
local function enter(key, uri, request, job_id, commands, data, queue, priority, ticket, est_ms, sticky, ttl_ms,
  fallback_ttl_ms)
  local slot = line_up(key, queue, priority, ticket, est_ms)
  redis.call('HSET', status_name(key), 'state', 'pending', 'request', request, 'job_id', job_id, 'queue', queue,
    'priority', int(priority), 'sticky', sticky, 'ttl_ms', int(ttl_ms), 'fallback_ttl_ms', int(fallback_ttl_ms),
    'est_ms', int(est_ms), 'ticket', int(ticket), 'slot', slot, 'submitted_ms', int(now_ms), 'pushed_ms', int(now_ms),
    uri_fields(uri))
  replay(commands, data)
  event('submit', key, 'pending')
end

-- Order-free: sticky = or, TTL = max. A weaker joiner changes nothing.
local function raise_wishes(key, fields, sticky, ttl_ms, fallback_ttl_ms)
  local changes = {}
  local function raise(field, value)
    if value > (tonumber(fields[field] or nil) or 0) then
      changes[#changes + 1] = field
      changes[#changes + 1] = int(value)
    end
  end
  raise('sticky', sticky)
  raise('ttl_ms', ttl_ms)
  raise('fallback_ttl_ms', fallback_ttl_ms)
  if #changes > 0 then redis.call('HSET', status_name(key), unpack(changes)) end
end

-- The job of a ticket that is replaced. Whoever popped it may be dead before he told RQ, and then nobody ever deletes the
-- hash: it gets an end. Its list skips it when it is gone. RQ's own end of a job, when there is one, is sooner. The name
-- is that of the new job with the old id.
local TICKET_KEPT_MS = 24 * 60 * 60 * 1000
local function retire(old_job_id, job_id, commands)
  if not old_job_id or old_job_id == job_id then return end
  local name = cjson.decode(commands)[2][2]
  local replaced = string.sub(name, 1, #name - #job_id) .. old_job_id
  if redis.call('PTTL', replaced) == -1 then redis.call('PEXPIRE', replaced, TICKET_KEPT_MS) end
end

-- What an attempt has emitted: a list behind a head, 'token:first:bytes', which says whose they are, the number of the first
-- that is kept, and their size. The record names the attempt too, so a list that was left behind counts for nothing.
local function kept_emissions(key, token)
  local head = token and redis.call('LINDEX', emitted_name(key), 0) or ''
  local owner, first, bytes = string.match(head, '^(%d+):(%d+):(%d+)$')
  if not owner or owner ~= token then return 1, 0, 0 end
  return tonumber(first), redis.call('LLEN', emitted_name(key)) - 1, tonumber(bytes)
end

-- The attempt that emitted or told its progress is over, and another will begin: its followers hear of it.
local function withdraw_emissions(key)
  if redis.call('HDEL', status_name(key), 'emitted', 'progress') > 0 then
    redis.call('UNLINK', emitted_name(key))
    redis.call('PUBLISH', told_name(key), 'restart')
  end
end

-- A claim goes back to pending behind a new ticket. Its place in line is that of the old one. `job`: RQ's job hash of the
-- old ticket, which ends with the attempt; none or '' = somebody else may be at it.
local function requeue(key, fields, job_id, commands, data, job)
  if job and job ~= '' then redis.call('UNLINK', job) else retire(fields.job_id, job_id, commands) end
  leave_line(key, fields)
  if fields.limit then vacate(key, fields.limit) end
  redis.call('ZREM', leases_name(), key)
  local ticket, priority = tonumber(fields.ticket), tonumber(fields.priority)
  local slot = line_up(key, fields.queue, priority, ticket, tonumber(fields.est_ms) or 0, fields.slot)
  redis.call('HSET', status_name(key), 'state', 'pending', 'job_id', job_id, 'slot', slot, 'pushed_ms', int(now_ms))
  redis.call('HDEL', status_name(key), 'token', 'exec', 'lease_until', 'worker', 'popped', 'needs', 'recall',
    'recall_data')
  withdraw_emissions(key)
  replay(commands, data)
end

-- An execution begins: a token that is higher than every token before, and a lease.
local function begin(key, fields, exec, worker, lease_ms)
  -- First what fails when somebody else uses the name: the ticket is out of its list, and the line still has the key.
  redis.call('ZADD', leases_name(), int(now_ms + lease_ms), key)
  local token, status = next_seq(), status_name(key)
  fields.left = leave_line(key, fields)
  if fields.limit then
    -- RARE
    arrive(key, fields.limit)
    -- /RARE
  end
  if fields.state == 'failed' then
    redis.call('PERSIST', status)
    redis.call('PERSIST', callbacks_name(key))
    redis.call('PERSIST', followup_name(key))
    redis.call('HDEL', status, 'ended_ms')
  end
  if fields.due_ms then redis.call('HDEL', status, 'due_ms', 'needs', 'recall', 'recall_data') end
  fields.token, fields.started_ms = int(token), int(now_ms)
  fields.attempts = int((tonumber(fields.attempts) or 0) + 1)
  redis.call('HSET', status, 'state', 'in_progress', 'token', fields.token, 'exec', exec, 'worker', worker,
    'started_ms', fields.started_ms, 'lease_ms', int(lease_ms), 'lease_until', int(now_ms + lease_ms),
    'attempts', fields.attempts)
  event('start', key, 'in_progress')
end

-- What an execution needs to know, in the order of the answers of start and take; and what begin must know beside it. The
-- trace context stands behind it, where there is one.
local ATTEMPT = {'token', 'attempts', 'request', 'kwargs', 'retries', 'crashes', 'queue', 'priority', 'job_id',
  'pushed_ms', 'started_ms', 'uri', 'uri_2', 'uri_3'}
local BEFORE = {'state', 'exec', 'slot', 'est_ms', 'limit', 'due_ms', 'alias', 'trace', unpack(ATTEMPT)}

local function attempt(fields)
  local values = {}
  for i, name in ipairs(ATTEMPT) do values[i] = fields[name] or false end
  if fields.trace then values[#ATTEMPT + 1] = fields.trace end
  return unpack(values)
end

-- An attempt that failed is noted in the record, the newest ATTEMPTS_KEPT on a ring: as long as the record lives, and no
-- longer. Netstrings: number, worker, when it began and ended, how, and the packed error. What completes leaves no note.
local ATTEMPTS_KEPT = 10
local function note_attempt(key, fields, word, err)
  local number, note = tonumber(fields.attempts) or 0, ''
  for _, value in ipairs({int(number), fields.worker or '', fields.started_ms or '', int(now_ms), word, err}) do
    note = note .. #value .. ':' .. value
  end
  redis.call('HSET', status_name(key), 'tried_' .. number % ATTEMPTS_KEPT, note)
end

-- The end of a flight, whatever the end is: first for the others, then in the record.
local function make_room(key, fields)
  if fields.state ~= 'in_progress' then
    -- RARE
    leave_line(key, fields)
    -- /RARE
  end
  if fields.limit then
    -- RARE
    vacate(key, fields.limit)
    -- /RARE
  end
  redis.call('ZREM', leases_name(), key)
end

local function land(key, fields)
  make_room(key, fields)
  redis.call('HDEL', status_name(key), 'token', 'exec', 'lease_until', 'progress', 'needs', 'recall', 'recall_data')
end

-- Failed and cancelled requests that are not set aside, by the time of their end: only views read these. They hold the
-- newest, `readmit` takes out what begins anew, and the sweep what has expired.
local ENDED_KEPT = 10000
local function list_ended(key, state)
  redis.pcall('ZADD', ended_name(state), int(now_ms), key)
  redis.pcall('ZREMRANGEBYRANK', ended_name(state), 0, -ENDED_KEPT - 1)
end
