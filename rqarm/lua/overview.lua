-- overview: everything that the dashboard, `rqarm top` and the metrics say of a namespace, in one look that only reads.
--
-- Nothing grows with the number of requests: lines and indexes are counted, and only their heads are read. What grows is
-- the number of queues, of workers, and, up to LOOKED_AT, of what runs.
--
-- KEYS queues   set  logical queues that were ever used
-- ARGV prefix   str  of every key of ours
-- ARGV queue    str  the caller's own, shown when it has workers although nobody has used it
-- ARGV workers  str  names of the sets of RQ's workers, with * for the queue, to the end
--
-- Returns {'overview', now_ms, families, lines, workers, numbers, hot, runtimes}
-- Returns also: families name, flat hash, ...; lines for each queue its name, waiting, oldest_ms, load_ms, running, left_ms,
-- workers; workers name, state, version, beat, ...; numbers name, number, ...; hot key, votes, uri, state, size,
-- ...; runtimes family, ms, ...

local queues = KEYS[1]
local queue, workers = ARGV[2], {unpack(ARGV, 3)}

local LOOKED_AT, HOTTEST, MOST_QUEUES = 1000, 20, 200

local families = {}
for _, family in ipairs({'submissions', 'executions', 'refusals', 'removals', 'sweeps', 'cache'}) do
  families[#families + 1] = family
  families[#families + 1] = counted(family)
end

-- What runs, by queue: the leases know no queue, the records do.
local running, left_ms = {}, {}
for _, key in ipairs(redis.call('ZRANGE', leases_name(), 0, LOOKED_AT - 1)) do
  local run = look_at(key, 'queue', 'est_ms', 'started_ms')
  if run.queue then
    local left = (tonumber(run.est_ms) or 0) - (now_ms - (tonumber(run.started_ms) or now_ms))
    running[run.queue] = (running[run.queue] or 0) + 1
    left_ms[run.queue] = (left_ms[run.queue] or 0) + math.max(left, 0)
  end
end

-- Sets of RQ's name the keys of worker hashes; the hash of a dead worker expires.
local alive, listed = {}, {}
local function look_at_worker(name)
  if alive[name] == nil then
    local known = redis.pcall('HMGET', name, 'state', 'rqarm_version', 'last_heartbeat')
    alive[name] = not known.err and known[1] and true or false
    if alive[name] then
      for _, value in ipairs({name, known[1], known[2] or '', known[3] or ''}) do listed[#listed + 1] = value end
    end
  end
  return alive[name]
end

local function workers_of(name)
  local live, seen = 0, {}
  for _, pattern in ipairs(workers) do
    local set = string.gsub(pattern, '%*', function() return name end)
    for _, worker in ipairs(redis.call('SMEMBERS', set)) do
      if not seen[worker] and look_at_worker(worker) then live = live + 1 end
      seen[worker] = true
    end
  end
  return live
end

-- The first of each priority has waited longest in it: a ticket is a time.
local function oldest_ms(name)
  local oldest = -1
  for rank = 0, 2 do
    local first = redis.call('ZRANGEBYSCORE', pending_name(name), int(rank * STRIDE), '(' .. int((rank + 1) * STRIDE),
      'WITHSCORES', 'LIMIT', 0, 1)
    if first[2] then oldest = math.max(oldest, now_ms - (tonumber(first[2]) - rank * STRIDE) / 1000) end
  end
  return oldest
end

local function load_of(name)
  local sum = 0
  for _, value in ipairs(redis.call('HMGET', load_name(name), '0t', '1t', '2t')) do
    sum = sum + (tonumber(value or nil) or 0)
  end
  return sum
end

local names = redis.call('SMEMBERS', queues)
if redis.call('SISMEMBER', queues, queue) == 0 and workers_of(queue) > 0 then names[#names + 1] = queue end
table.sort(names)
local lines, pending = {}, 0
for i, name in ipairs(names) do
  local waiting = redis.call('ZCARD', pending_name(name))
  pending = pending + waiting
  if i <= MOST_QUEUES then
    lines[#lines + 1] = {name, waiting, int(oldest_ms(name)), int(load_of(name)), running[name] or 0,
      int(left_ms[name] or 0), workers_of(name)}
  end
end

local parked, called = 0, 0
for _, limit in ipairs(redis.call('HKEYS', limits_name())) do
  parked = parked + redis.call('ZCARD', parked_name(limit))
  called = called + redis.call('ZCARD', called_name(limit))
end

local results, now = results_name(), int(now_ms)
local numbers = {
  'pending', pending, 'parked', parked, 'called', called, 'in_progress', redis.call('ZCARD', leases_name()),
  'quarantined', redis.call('ZCARD', quarantine_name()), 'failed', redis.call('ZCARD', ended_name('failed')),
  'cancelled', redis.call('ZCARD', ended_name('cancelled')),
  'temporary', redis.call('ZCOUNT', results, '(' .. now, '(+inf'), 'sticky', redis.call('ZCOUNT', results, '+inf', '+inf'),
  'overdue', redis.call('ZCOUNT', leases_name(), '-inf', '(' .. now),
}
local first_overdue = redis.call('ZRANGE', leases_name(), 0, 0, 'WITHSCORES')
numbers[#numbers + 1] = 'overdue_ms'
numbers[#numbers + 1] = first_overdue[2] and int(math.max(now_ms - tonumber(first_overdue[2]), 0)) or 0

-- The keys with the most votes; see prelude. Old votes count less.
local voted = {}
for field, cell in pairs_of(families[2]) do
  if string.find(field, '^h%d+$') then
    local votes, key = votes_in(cell)
    if votes > 0 then voted[#voted + 1] = {votes = votes, key = key} end
  end
end
table.sort(voted, function(a, b) return a.votes > b.votes or a.votes == b.votes and a.key < b.key end)
local hot = {}
for i = 1, math.min(#voted, HOTTEST) do
  local key = voted[i].key
  local fields = look_at(key, 'state', 'uri', 'uri_2', 'uri_3')
  if fields.state then
    for _, value in ipairs({key, int(voted[i].votes), uri_of(fields), fields.state,
      redis.call('ZSCORE', sizes_name(), key) or '0'}) do hot[#hot + 1] = value end
  end
end

return {'overview', now, families, lines, listed, numbers, hot, redis.call('HGETALL', stats_name('runtime'))}
