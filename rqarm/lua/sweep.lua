-- sweep: find what died without a word, in one bounded step; tidy the indexes. The finder then calls crash or revive
-- for each, which look again: two sweeps at once, or one that is killed, do no harm.
--
-- A ticket counts as lost when it is not in RQ's list although its request has waited for over a lease. The first
-- `limit` in line are checked every time; the rest only while the list is shorter than the line. Behind the first
-- thousand entries of a list that is not empty nobody looks: their turn comes when the list is that short.
--
-- FLAGS allow-oom
-- KEYS leases      zset   key by deadline
-- ARGV prefix      str    of every key of ours
-- ARGV queue       str    logical queue whose line is checked
-- ARGV cursor      int    where to go on in line; 0 = from the front, with leases and indexes
-- ARGV limit       int    requests of one step
-- ARGV lease_ms    int    patience
-- ARGV job_prefix  str    of RQ's job hashes
-- ARGV keep        int    quarantined requests kept at the most
-- ARGV lists       str    RQ's lists: high, default, low, to the end
--
-- Returns {'swept', lapsed, ticketless, cursor}
-- Returns also: lapsed key, uri, queue, priority, crashes, ...; ticketless key, uri, queue, priority, job_id, ...;
-- cursor 0 = done.

local leases = KEYS[1]
local queue, cursor, limit, lease_ms = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local job_prefix, keep, lists = ARGV[6], tonumber(ARGV[7]), {unpack(ARGV, 8)}

local LOOKED_AT, TAKERS_KEPT = 1000, 10000
-- How long a failure waits for a worker that wants to be told of it.
local UNATTENDED_KEPT_US = 24 * 60 * 60 * 1000000
local WAITING = {queued = true, deferred = true, started = true}
-- How long an RQ worker that has popped a ticket may load the handlers before it starts the request, at least.
local LOADING_MS = 10000

local lapsed, ticketless = {}, {}

local function report(list, key, fields, last)
  for _, value in ipairs({key, uri_of(fields), fields.queue or queue, fields.priority or '1', last}) do
    list[#list + 1] = value
  end
end

-- A deadline further away than two leases is clock damage: from now on it is one lease away.
local function clamp(key, fields)
  local one = tonumber(fields.lease_ms) or lease_ms
  if tonumber(fields.lease_until) > now_ms + 2 * one then
    redis.call('HSET', status_name(key), 'lease_until', int(now_ms + one))
    redis.call('ZADD', leases, int(now_ms + one), key)
    count('sweeps', 'clamped')
  end
end

local function check_lease(key)
  local claim = look_at(key, 'state', 'uri', 'uri_2', 'uri_3', 'queue', 'priority', 'crashes', 'lease_until',
    'lease_ms')
  if claim.state ~= 'in_progress' then
    redis.call('ZREM', leases, key)
  elseif tonumber(claim.lease_until) <= now_ms then
    report(lapsed, key, claim, claim.crashes or '0')
  else
    clamp(key, claim)
  end
end

local lengths = {}
for rank, list in ipairs(lists) do lengths[rank] = redis.call('LLEN', list) end

-- An RQ worker is at the job. It forks and imports before it asks to start, and to replace its ticket meanwhile would
-- only make it begin again. Nobody says when it popped, so it counts from the first look.
local function is_loading(key, claim)
  local job_id, seen_ms = string.match(claim.popped or '', '^(%S+) (%d+)$')
  if job_id == claim.job_id then return now_ms < tonumber(seen_ms) + math.max(lease_ms, LOADING_MS) end
  redis.call('HSET', status_name(key), 'popped', claim.job_id .. ' ' .. int(now_ms))
  return true
end

local function has_ticket(key, claim)
  local rank = tonumber(claim.priority) + 1
  local delivery = redis.pcall('HGET', job_prefix .. claim.job_id, 'status')
  if type(delivery) ~= 'string' or not WAITING[delivery] then return false end
  if delivery == 'started' then return is_loading(key, claim) end
  if lengths[rank] == 0 then return false end
  if lengths[rank] > LOOKED_AT and cursor > 0 then return true end
  return redis.call('LPOS', lists[rank], claim.job_id, 'MAXLEN', LOOKED_AT) or lengths[rank] > LOOKED_AT
end

local function check_line(key)
  local claim = look_at(key, 'state', 'uri', 'uri_2', 'uri_3', 'queue', 'priority', 'job_id', 'pushed_ms',
    'due_ms', 'popped')
  if claim.state ~= 'pending' then
    redis.call('ZREM', pending_name(queue), key)
    -- What a vanished record added to the load is unknown; with the last of the line it goes at least then.
    if redis.call('ZCARD', pending_name(queue)) == 0 then redis.call('DEL', load_name(queue)) end
  elseif math.max(tonumber(claim.pushed_ms), tonumber(claim.due_ms) or 0) < now_ms - lease_ms
    and not has_ticket(key, claim) then
    report(ticketless, key, claim, claim.job_id)
  end
end

-- What was redirected and has waited for a lease since the last look; those whose root is in flight wait for another.
local function check_redirected()
  local due = redis.call('ZRANGEBYSCORE', redirected_name(), '-inf', int(now_ms - lease_ms), 'LIMIT', 0, limit)
  for _, key in ipairs(due) do
    local claim = look_at(key, 'state', 'uri', 'uri_2', 'uri_3', 'queue', 'priority', 'job_id', 'alias')
    if claim.state ~= 'pending' or not claim.alias then
      redis.call('ZREM', redirected_name(), key)
    elseif is_led(claim) then
      redis.call('ZADD', redirected_name(), int(now_ms), key)
    else
      report(ticketless, key, claim, claim.job_id)
    end
  end
end

local function tidy()
  -- One field for each thread that ever took work. Forgetting them costs a taker whose last reply was lost, no more.
  if redis.call('HLEN', takers_name()) > TAKERS_KEPT then redis.call('DEL', takers_name()) end
  for _, key in ipairs(redis.call('ZRANGEBYSCORE', results_name(), '-inf', int(now_ms), 'LIMIT', 0, limit)) do
    if redis.call('EXISTS', result_name(key)) == 0 then drop_result(key, 'expired') end
  end
  for _, name in ipairs({ended_name('failed'), ended_name('cancelled')}) do
    for _, key in ipairs(redis.call('ZRANGE', name, 0, limit - 1)) do
      if redis.call('EXISTS', status_name(key)) == 0 then redis.call('ZREM', name, key) end
    end
  end
  trim_quarantine(keep, limit)
  -- Failures of which nobody wants to be told. Their scores are tickets, times in microseconds.
  for _, name in ipairs({unattended_name('failure'), unattended_name('quarantine')}) do
    redis.call('ZREMRANGEBYSCORE', name, '-inf', int(now_us - UNATTENDED_KEPT_US))
    redis.call('ZREMRANGEBYRANK', name, 0, -keep - 1)
  end
end

-- The transitions keep the places under a limit exactly. What they cannot know is that a record was deleted, or ended
-- by a version without limits.
local function check_limits()
  for _, name in ipairs(redis.call('HKEYS', limits_name())) do
    local running, called, parked = running_name(name), called_name(name), parked_name(name)
    for index, state in pairs({[running] = 'in_progress', [called] = 'pending'}) do
      for _, key in ipairs(redis.call('ZRANGE', index, 0, limit - 1)) do
        local claim = look_at(key, 'state', 'limit')
        if claim.state ~= state or claim.limit ~= name then redis.call('ZREM', index, key) end
      end
    end
    call_up(name)
    if redis.call('EXISTS', running, called, parked) == 0 then redis.call('HDEL', limits_name(), name) end
  end
end

if cursor == 0 then
  for _, key in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', int(now_ms), 'LIMIT', 0, limit)) do
    check_lease(key)
  end
  local far = '(' .. int(now_ms + 2 * lease_ms)
  for _, key in ipairs(redis.call('ZRANGEBYSCORE', leases, far, '+inf', 'LIMIT', 0, limit)) do check_lease(key) end
  check_limits()
  check_redirected()
  tidy()
end

local line = redis.call('ZRANGE', pending_name(queue), cursor, cursor + limit - 1)
for _, key in ipairs(line) do check_line(key) end

local waiting = 0
for _, length in ipairs(lengths) do waiting = waiting + length end
local more = #line == limit and waiting < redis.call('ZCARD', pending_name(queue))
return {'swept', lapsed, ticketless, more and cursor + limit or 0}
