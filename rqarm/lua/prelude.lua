-- prelude: what the transitions share. A script gets the paragraphs that it needs; key names are written out by
-- rqarm.keys.
--
-- Order of work in every script: read, refuse, write, one return. Numbers go out as '%.0f': a Lua number printed by
-- tostring loses digits above 1e14, and our times in microseconds are above.

-- Score of a pending request = priority * STRIDE + ticket. A ticket is a time in microseconds, so it stays below
-- the stride until 2049, and the highest score stays below 2^53.
local STRIDE = 2.5e15
-- Radix of the load sums: a prefix sum reads at most 2 * RADIX fields and the top level.
local RADIX = 128
-- Weight of the newest run in the learned run time, and the most families that are learned.
local NEWEST, MOST_FAMILIES = 0.2, 1000
local EVENTS_KEPT = 10000
-- Requests that one free place or one step of the sweep calls up at the most.
local MOST_CALLED = 100

local function int(n) return string.format('%.0f', n) end

local clock = redis.call('TIME')
local now_us = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local now_ms = math.floor(now_us / 1000)

-- Rises for ever: outlives records, FLUSHDB (the time is higher than any token before it) and clock steps.
local function next_seq()
  local seq = math.max(tonumber(redis.call('GET', seq_name()) or 0) + 1, now_us)
  redis.call('SET', seq_name(), int(seq))
  return seq
end

local function record(key, ...)
  local values = redis.call('HMGET', status_name(key), ...)
  local fields = {}
  for i, name in ipairs({...}) do fields[name] = values[i] end
  return fields
end

-- The identity lies in pieces of 64 bytes; the third takes what is left. One value that is longer, and the server stores
-- the whole record in another way, which takes three times as much. An earlier form is one piece of any length.
local function uri_fields(uri)
  local fields = {'uri', string.sub(uri, 1, 64)}
  if #uri > 64 then fields[3], fields[4] = 'uri_2', string.sub(uri, 65, 128) end
  if #uri > 128 then fields[5], fields[6] = 'uri_3', string.sub(uri, 129) end
  return unpack(fields)
end

local function uri_of(fields)
  return (fields.uri or '') .. (fields.uri_2 or '') .. (fields.uri_3 or '')
end

-- The record for the caller, as one string: netstrings of RECORD_FIELDS in their order, '-' for a field that is not
-- there. One string, because a client reads it several times faster than a list of fourteen.
local function packed_record(values)
  for i = 1, #RECORD_FIELDS do values[i] = values[i] and #values[i] .. ':' .. values[i] or '-' end
  return table.concat(values, '', 1, #RECORD_FIELDS)
end

local function answer_fields(key)
  return packed_record(redis.call('HMGET', status_name(key), unpack(RECORD_FIELDS)))
end

-- The pairs of a flat list.
local function pairs_of(flat)
  local i = -1
  return function()
    i = i + 2
    return flat[i], flat[i + 1]
  end
end

-- Statistics never stand in the way: a hit is answered also when memory is out, and what somebody else wrote into them stops
-- nothing. A transition only notes what happened, by one RPUSH; whoever makes it MOST_NOTED notes adds them up, and who
-- reads adds the rest. True: it is time to `settle`. A note of a submit: minute, outcome, family, ms that were saved, the
-- key that was hit. A hit saves the run that made the result, a join the one that it waits for.
local MOST_NOTED = 100
local function note_submission(outcome, key, family, fields)
  local saved_ms, hit = 0, ''
  if outcome == 'hit' then
    saved_ms, hit = (tonumber(fields.ended_ms) or 0) - (tonumber(fields.started_ms) or math.huge), key
  elseif outcome == 'joined' then
    saved_ms = tonumber(fields.est_ms) or 0
  end
  local noted = redis.pcall('RPUSH', noted_name('submissions'), math.floor(now_ms / 60000) .. '\n' .. outcome .. '\n'
    .. string.sub(family, 1, 61) .. '\n' .. math.max(saved_ms, 0) .. '\n' .. hit)
  return type(noted) == 'number' and noted >= MOST_NOTED
end

-- A part of a URI is a label only when it looks like a name: neither a key nor a number of somebody's.
local function route_of(family)
  if #family > 60 or string.find(family, '%x%x%x%x%x%x%x%x') or string.find(family, '%d%d%d%d%d') then return '*' end
  return family
end

-- Upper bounds of the histograms, of which a field is named: '+' has no bound.
local TIMES_MS = {5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000, 1800000, 3600000}
local SIZES = {256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864, 268435456, 1073741824}
local function within(bounds, value)
  for i = 1, #bounds do
    if value <= bounds[i] then return bounds[i] end
  end
  return '+'
end

-- `h<cell>`: the key that the cell votes for. Half of the votes go with each hour; another key takes them off, and the
-- cell when it is empty: so keys that are asked for often stay, in 256 cells, whatever the number of keys.
local HOUR_MS = 3600000
local function votes_in(cell)
  local votes, since, key = string.match(cell or '', '^(%d+) (%d+) (.+)$')
  if not votes then return 0 end
  return math.floor(votes * 0.5 ^ math.max(math.floor(now_ms / HOUR_MS) - since, 0)), key
end

-- The notes of a family, added to its counters in `known`; answers those that changed. Fields: `word` in all;
-- `m<slot>:word` in the minute that its value names first, on a ring; `r:word:route`, as many as `:routes:word` says, then
-- `r:word:*`; the others stand in docs/keys.md. What many notes have in common is looked at once. `fetch` reads many fields.
local MINUTES_KEPT, MOST_LABELS = 64, 100
local function add_up(family, noted, known, fetch)
  local times, groups, hits, changed = {}, {}, {}, {}
  local function observe(seen, bounds, value, n)
    local bound = within(bounds, value)
    seen[bound], seen.sum = (seen[bound] or 0) + n, (seen.sum or 0) + value * n
  end
  local function group_of(about, n)
    local group = groups[about] or {n = 0, saved_ms = 0, run = {}, wait = {}, size = {}}
    groups[about], group.n = group, group.n + n
    return group
  end
  local function see_submission(note, n)
    local about, saved_ms, hit = string.match(note, '^(.*)\n(%S*)\n(%S*)$')
    if not about then return end
    local group = group_of(about, n)
    if saved_ms ~= '0' then group.saved_ms = group.saved_ms + (tonumber(saved_ms) or 0) * n end
    if hit ~= '' then hits[hit] = (hits[hit] or 0) + n end
  end
  local function see_end(note, n)
    local about, run_ms, wait_ms, size = string.match(note, '^(.*)\n(%d*)\n(%d*)\n(%d*)$')
    if not about then return end
    local group = group_of(about, n)
    if run_ms ~= '' then observe(group.run, TIMES_MS, tonumber(run_ms), n) end
    if wait_ms ~= '' then observe(group.wait, TIMES_MS, tonumber(wait_ms), n) end
    if size ~= '' then observe(group.size, SIZES, tonumber(size), n) end
  end
  for _, note in ipairs(noted) do times[note] = (times[note] or 0) + 1 end
  for note, n in pairs(times) do (family == 'submissions' and see_submission or see_end)(note, n) end
  local function set(name, value) known[name], changed[name] = value, value end
  local function add(name, n) set(name, int((tonumber(known[name] or nil) or 0) + n)) end
  local function add_minute(minute, word, n)
    local slot, ago = 'm' .. minute % MINUTES_KEPT .. ':' .. word, math.floor(now_ms / 60000) - minute
    -- What is older than the ring, or ahead of the clock, stands in the sum only.
    if ago < 0 or ago >= MINUTES_KEPT then return end
    local then_minute, before = string.match(known[slot] or '', '^(%d+) (%d+)$')
    set(slot, minute .. ' ' .. int((then_minute == minute and before or 0) + n))
  end
  local function add_route(word, route, n)
    local field, rest = 'r:' .. word .. ':' .. route, 'r:' .. word .. ':*'
    if field ~= rest and not known[field] then
      if (tonumber(known[':routes:' .. word] or nil) or 0) >= MOST_LABELS then return add(rest, n) end
      add(':routes:' .. word, 1)
    end
    add(field, n)
  end
  local function add_vote(key, cell, n)
    local votes, held_by = votes_in(known[cell])
    votes = held_by == key and votes + n or votes - n
    if votes < 0 then votes, held_by = -votes, key end
    set(cell, votes .. ' ' .. math.floor(now_ms / HOUR_MS) .. ' ' .. held_by)
  end
  for about, group in pairs(groups) do
    local minute, word, name, queue = string.match(about, '^(%d+)\n(%l+)\n([^\n]*)\n?(.*)$')
    if minute then
      add(word, group.n)
      add_minute(minute, word, group.n)
      if family == 'submissions' or group.size.sum then add_route(word, route_of(name), group.n) end
      if group.saved_ms > 0 then add('saved:' .. word, group.saved_ms) end
      if group.run.sum then add('q:' .. word .. ':' .. queue, group.n) end
      for bound, n in pairs(group.run) do add('run:' .. bound .. ':' .. queue, n) end
      for bound, n in pairs(group.wait) do add('wait:' .. bound .. ':' .. queue, n) end
      for bound, n in pairs(group.size) do add('size:' .. bound .. ':', n) end
    end
  end
  local keys, cells = {}, {}
  for key in pairs(hits) do
    keys[#keys + 1], cells[#cells + 1] = key, 'h' .. (tonumber(string.sub(key, -2), 16) or #key)
  end
  if fetch then fetch(known, cells) end
  for i, key in ipairs(keys) do add_vote(key, cells[i], hits[key]) end
  return changed
end

-- The servers keep a small hash as a list and search it from its start for each field, which costs more than all else here.
-- One value above 64 bytes makes it a table.
local AS_TABLE = 'longer than hash-max-listpack-value, so that the server finds a field at once'

-- What somebody else noted must not stop a transition in the middle, nor make it long.
local function settle(family)
  local function read(known, field)
    local value = redis.pcall('HGET', stats_name(family), field)
    known[field] = type(value) == 'string' and value
    return known[field]
  end
  local function fetch(known, names)
    for i, value in ipairs(names[1] and redis.call('HMGET', stats_name(family), unpack(names)) or {}) do
      known[names[i]] = value
    end
  end
  local noted = redis.pcall('LPOP', noted_name(family), MOST_NOTED)
  local found, changed = pcall(add_up, family, noted, setmetatable({}, {__index = read}), fetch)
  if not found then return end
  local flat = {':', AS_TABLE}
  for field, value in pairs(changed) do flat[#flat + 1], flat[#flat + 2] = field, value end
  redis.pcall('HSET', stats_name(family), unpack(flat))
end

-- The counters of a family as they are now, for who only reads: a flat list.
local function counted(family)
  local known, flat = {}, redis.pcall('HGETALL', stats_name(family))
  for field, value in pairs_of(flat) do known[field] = value end
  pcall(add_up, family, redis.pcall('LRANGE', noted_name(family), 0, -1), known)
  flat = {}
  for field, value in pairs(known) do flat[#flat + 1], flat[#flat + 2] = field, value end
  return flat
end

local function count_submission(outcome, key, family, fields)
  if note_submission(outcome, key, family, fields) then settle('submissions') end
end

-- A note of an attempt that ended: minute, word; if for good: family, queue, ms that it ran and had waited, stored size.
local function note_end(word, family, queue, run_ms, wait_ms, size_bytes)
  local noted = redis.pcall('RPUSH', noted_name('executions'), math.floor(now_ms / 60000) .. '\n' .. word .. '\n'
    .. string.sub(family, 1, 61) .. '\n' .. queue .. '\n' .. run_ms .. '\n' .. wait_ms .. '\n' .. size_bytes)
  if type(noted) == 'number' and noted >= MOST_NOTED then settle('executions') end
end

local function count(family, word)
  if family == 'executions' then note_end(word, '', '', '', '', '') else redis.pcall('HINCRBY', stats_name(family), word, 1) end
end

-- An attempt that ended for good. `size_bytes` and `family` are known of a result only.
local function count_end(word, fields, family, size_bytes)
  local started_ms = tonumber(fields.started_ms) or now_ms
  local waited_ms = started_ms - (tonumber(fields.pushed_ms) or started_ms)
  note_end(word, family or '', fields.queue or '', int(math.max(now_ms - started_ms, 0)), int(math.max(waited_ms, 0)),
    size_bytes or '')
end

-- An attempt speaks that holds its request no more. `duplicate`: another one runs it now, or has ended it, so the work
-- was done twice. `late`: the request was cancelled, put, handed back or given a new ticket meanwhile.
local function count_refusal(fields, token)
  local is_duplicate = fields.state == 'in_progress'
    or (tonumber(string.match(fields.done_token or '', '^%d+$')) or 0) > (tonumber(token) or math.huge)
  count('refusals', is_duplicate and 'duplicate' or 'late')
end

local function event(verb, key, state)
  redis.pcall('XADD', events_name(), 'MAXLEN', '~', EVENTS_KEPT, '*', 'verb', verb, 'key', key, 'state', state)
end

-- The message is the state. A small result goes with it, and spares those who wait the look at the record: `state:length of
-- the envelope:envelope bytes`. Bounded, because each of them gets it.
local MOST_TOLD = 1024
local function wake(key, state, envelope, bytes)
  if envelope and #envelope + #bytes <= MOST_TOLD then state = state .. ':' .. #envelope .. ':' .. envelope .. bytes end
  redis.call('PUBLISH', done_name(key), state)
end

-- Replays RQ's recorded commands: a JSON list of commands, each a list of strings. What is not text stands in `data`
-- and goes to the place that the list names at its end: number of the command, number of the argument.
local function replay(commands, data)
  local list = cjson.decode(commands)
  local place = table.remove(list)
  list[place[1]][place[2]] = data
  for _, command in ipairs(list) do redis.call(unpack(command)) end
end

-- The load of a queue: sums of estimated run times, by position in line, on three levels, so that the time ahead of
-- a request is a sum of a few hundred fields at the most, whatever the length of the queue.
local function add_load(queue, slot, est_ms)
  local rank, n = string.match(slot, '^(%d):(%d+)$')
  local load = load_name(queue)
  redis.call('HINCRBY', load, rank .. 't', est_ms)
  for level = 0, 2 do
    local field = rank .. level .. ':' .. math.floor(tonumber(n) / RADIX ^ level)
    if redis.call('HINCRBY', load, field, est_ms) == 0 then redis.call('HDEL', load, field) end
  end
end

local function load_before(queue, slot)
  local rank, n = string.match(slot, '^(%d):(%d+)$')
  local fields, at = {}, tonumber(n)
  for other = 0, tonumber(rank) - 1 do fields[#fields + 1] = other .. 't' end
  for level = 0, 2 do
    local from = level < 2 and math.floor(at / RADIX) * RADIX or 0
    for i = from, at - 1 do fields[#fields + 1] = rank .. level .. ':' .. i end
    at = math.floor(at / RADIX)
  end
  local sum = 0
  for from = 1, #fields, 4000 do
    local values = redis.call('HMGET', load_name(queue), unpack(fields, from, math.min(from + 3999, #fields)))
    for _, value in ipairs(values) do sum = sum + (tonumber(value) or 0) end
  end
  return sum
end

-- In line: the pending index and the load. A slot given stays, so a released request keeps its place. The slots start
-- over with an empty line: one from before that becomes 0, in front of all that were given out since. 'f' holds the
-- ticket of the first.
local function line_up(key, queue, priority, ticket, est_ms, slot)
  local load, rank = load_name(queue), int(priority)
  redis.call('ZADD', pending_name(queue), int(priority * STRIDE + ticket), key)
  if not slot then
    local n = redis.call('HINCRBY', load, rank .. 'n', 1)
    if n == 1 then
      redis.call('SADD', queues_name(), queue)
      redis.call('HSET', load, rank .. 'f', int(ticket))
    end
    slot = rank .. ':' .. n
  elseif ticket < (tonumber(redis.call('HGET', load, rank .. 'f') or nil) or math.huge) then
    slot = rank .. ':0'
  end
  if est_ms > 0 then add_load(queue, slot, int(est_ms)) end
  return slot
end

local function leave_line(key, fields)
  local pending = pending_name(fields.queue)
  if fields.state ~= 'in_progress' and redis.call('ZREM', pending, key) == 1 then
    local est_ms = tonumber(fields.est_ms) or 0
    if redis.call('ZCARD', pending) == 0 then
      redis.call('DEL', load_name(fields.queue))
    elseif est_ms > 0 then
      add_load(fields.queue, fields.slot, int(-est_ms))
    end
  end
end

-- What somebody else wrote under one of our names must not stop the healing of all others: a record that cannot be read
-- counts as gone.
local function look_at(key, ...)
  local values, fields = redis.pcall('HMGET', status_name(key), ...), {}
  if values.err then return fields end
  for i, name in ipairs({...}) do fields[name] = values[i] end
  return fields
end

-- Limits of routes. Under a limit a request runs (`running`), is called and on its way to a worker (`called`: its place is
-- kept, so that nobody overtakes it) or waits for a place (`parked`, in the order of the line). The record's `limit` says
-- that it is in one of the three. A place that gets free goes to the first that is parked. What is wrong with that one must
-- not stop the transition that freed the place: without a ticket it is found by the sweep.
local function call_up(limit)
  local room = (tonumber(redis.call('HGET', limits_name(), limit) or nil) or 0)
    - redis.call('ZCARD', running_name(limit)) - redis.call('ZCARD', called_name(limit))
  local chosen = {}
  for _ = 1, MOST_CALLED do
    local key = #chosen < room and redis.call('ZPOPMIN', parked_name(limit))[1]
    if not key then break end
    local fields = look_at(key, 'state', 'limit', 'recall', 'recall_data')
    if fields.state == 'pending' and fields.limit == limit and fields.recall then
      fields.key = key
      chosen[#chosen + 1] = fields
    end
  end
  -- Each goes to the front of RQ's list, so the first in line comes last.
  for i = #chosen, 1, -1 do
    local key = chosen[i].key
    redis.call('ZADD', called_name(limit), int(now_ms), key)
    redis.call('HDEL', status_name(key), 'due_ms', 'recall', 'recall_data')
    redis.call('HSET', status_name(key), 'pushed_ms', int(now_ms))
    pcall(replay, chosen[i].recall, chosen[i].recall_data)
    event('call', key, 'pending')
  end
end

local function vacate(key, limit)
  redis.call('HDEL', status_name(key), 'limit', 'recall', 'recall_data')
  redis.call('ZREM', running_name(limit), key)
  redis.call('ZREM', called_name(limit), key)
  redis.call('ZREM', parked_name(limit), key)
  call_up(limit)
end

-- A ticket under a limit is delivered. Who was called has its place. Who was not, because RQ's scheduler or somebody else
-- put the ticket back, must ask for one like a newcomer.
local function arrive(key, limit)
  redis.call('ZREM', parked_name(limit), key)
  if redis.call('ZREM', called_name(limit), key) == 1 then
    redis.call('ZADD', running_name(limit), int(now_ms), key)
  else
    redis.call('HDEL', status_name(key), 'limit', 'recall', 'recall_data')
  end
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
  leave_line(key, fields)
  if fields.limit then arrive(key, fields.limit) end
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

-- Out of the quarantine and of the lists of what has ended, whatever the reason. Who has not been told by now will not be.
local function readmit(key)
  redis.call('ZREM', quarantine_name(), key)
  redis.pcall('ZREM', ended_name('failed'), key)
  redis.pcall('ZREM', ended_name('cancelled'), key)
  redis.call('ZREM', unattended_name('failure'), key)
  redis.call('ZREM', unattended_name('quarantine'), key)
end

-- The ticket of a failed request was put back: it starts anew.
local function revoke_failure(key, fields)
  redis.call('HDEL', status_name(key), 'error', 'quarantined', 'note', 'negative_until', 'crashes', 'retries', 'alias',
    'redirect', 'failure_ttl_ms')
  withdraw_emissions(key)
  readmit(key)
  fields.crashes, fields.retries = nil, nil
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
  leave_line(key, fields)
  if fields.limit then vacate(key, fields.limit) end
  redis.call('ZREM', leases_name(), key)
end

local function land(key, fields)
  make_room(key, fields)
  redis.call('HDEL', status_name(key), 'token', 'exec', 'lease_until', 'progress', 'needs', 'recall', 'recall_data')
end

local function expire_at(name, deadline_ms)
  if deadline_ms then redis.call('PEXPIREAT', name, int(deadline_ms)) else redis.call('PERSIST', name) end
end

-- Failed and cancelled requests that are not set aside, by the time of their end: only views read these. They hold the
-- newest, `readmit` takes out what begins anew, and the sweep what has expired.
local ENDED_KEPT = 10000
local function list_ended(key, state)
  redis.pcall('ZADD', ended_name(state), int(now_ms), key)
  redis.pcall('ZREMRANGEBYRANK', ended_name(state), 0, -ENDED_KEPT - 1)
end

-- A record goes, with all that lies beside it but a result; and RQ's job, when one is given.
local function erase(key, job)
  redis.call('UNLINK', status_name(key), callbacks_name(key), followup_name(key), emitted_name(key),
    unpack(job and job ~= '' and {job} or {}))
end

-- Aliases of a root, and those who need it. Its end lands all of them in one step, and so does a forget: each costs the
-- server some 30 us.
local MOST_ALIASES = 1000

-- Redirects. An alias is a request that ended its attempt because another one, its root, has or will have the answer. In
-- flight it is pending and not in line; it stands in `redirected` and in the root's set `aliases`. Completed it has no result
-- of its own; its record leads to the root's and lives as long. The set outlives the root's end only then.
local function break_away(key, root)
  redis.call('SREM', aliases_name(root), key)
  redis.call('ZREM', redirected_name(), key)
  redis.call('HDEL', status_name(key), 'alias', 'redirect', 'failure_ttl_ms')
end

-- Whether the root of an alias in flight is in flight still.
local function is_led(fields)
  local root = look_at(fields.alias, 'state', 'alias')
  return (root.state == 'pending' or root.state == 'in_progress') and not root.alias
end

-- One of those that a request needs has ended, or leads elsewhere. Behind the last of them it is called up, and looks
-- again what has become of all.
local function satisfy(key, ended)
  redis.call('SREM', aliases_name(ended), key)
  local fields = look_at(key, 'state', 'needs', 'recall', 'recall_data')
  local from, to = string.find(fields.needs or '', '\n' .. ended .. '\n', 1, true)
  if fields.state ~= 'pending' or not from then return end
  local left = string.sub(fields.needs, 1, from) .. string.sub(fields.needs, to + 1)
  if left ~= '\n' then return redis.call('HSET', status_name(key), 'needs', left) end
  redis.call('HDEL', status_name(key), 'needs', 'recall', 'recall_data', 'due_ms')
  redis.call('HSET', status_name(key), 'pushed_ms', int(now_ms))
  pcall(replay, fields.recall, fields.recall_data)
  event('call', key, 'pending')
end

-- Those who hear of the end of a root: its aliases. Who only needs it, or did, is seen to here.
local function led_by(root)
  local led = {}
  for _, key in ipairs(redis.call('SMEMBERS', aliases_name(root))) do
    local fields = look_at(key, 'state', 'alias')
    if fields.alias ~= root then
      satisfy(key, root)
    elseif fields.state == 'pending' then
      led[#led + 1] = key
    end
  end
  return led
end

-- A request, and who led to it, lead to this root from now on: the keys of all of them.
local function lead_to(key, root)
  local led = led_by(key)
  redis.call('DEL', aliases_name(key))
  led[#led + 1] = key
  for _, other in ipairs(led) do
    redis.call('HSET', status_name(other), 'alias', root)
    redis.call('SADD', aliases_name(root), other)
  end
  redis.call('PERSIST', aliases_name(root))
  return led
end

-- The root ended without a result, and so do these, each for as long as its own route says.
local function end_aliases(keys, state, err, negative_until)
  for _, key in ipairs(keys) do
    local status = status_name(key)
    local kept_ms = tonumber(redis.call('HGET', status, 'failure_ttl_ms') or nil) or 0
    redis.call('HSET', status, 'state', state, 'ended_ms', int(now_ms))
    if state == 'failed' then redis.call('HSET', status, 'error', err or '') end
    if negative_until then redis.call('HSET', status, 'negative_until', negative_until) end
    redis.call('HDEL', status, 'failure_ttl_ms')
    redis.call('PEXPIRE', status, int(math.max(kept_ms, (tonumber(negative_until or nil) or 0) - now_ms, 1)))
    redis.call('ZREM', redirected_name(), key)
    list_ended(key, state)
    wake(key, state)
    event('alias', key, state)
  end
end

local function end_all_led_by(root, state, err, negative_until)
  end_aliases(led_by(root), state, err, negative_until)
  redis.call('UNLINK', aliases_name(root))
end

-- Why a request is set aside. After these nothing runs it but somebody's decision; after the others a submit may. '1' is
-- what an earlier form wrote for poison.
local BLOCKING = {['1'] = true, poison = true, asked = true}

local function set_aside(key, fields, err, reason, note, negative_until)
  land(key, fields)
  redis.call('HSET', status_name(key), 'state', 'failed', 'quarantined', reason, 'ended_ms', int(now_ms), 'error', err)
  if note and note ~= '' then redis.call('HSET', status_name(key), 'note', note) end
  redis.call('ZADD', quarantine_name(), int(now_ms), key)
  -- Whoever sees the death need not know the routes: a worker that does tells those who want to hear of it.
  local since = int(next_seq())
  redis.call('ZADD', unattended_name('failure'), since, key)
  redis.call('ZADD', unattended_name('quarantine'), since, key)
  wake(key, 'failed')
  end_all_led_by(key, 'failed', err, negative_until)
end

-- An alias leaves its root; the aliases of a root go with its result: how many.
local function drop_aliases(key)
  local root, dropped = look_at(key, 'alias').alias, 0
  if root then redis.call('SREM', aliases_name(root), key) end
  for _, alias in ipairs(redis.call('SMEMBERS', aliases_name(key))) do
    local fields = look_at(alias, 'state', 'alias')
    if fields.state == 'completed' and fields.alias == key then
      erase(alias)
      redis.call('ZREM', results_name(), alias)
      redis.call('ZREM', sizes_name(), alias)
      redis.call('SREM', aliases_name(key), alias)
      wake(alias, 'unknown')
      event('forget', alias, 'unknown')
      dropped = dropped + 1
    end
  end
  return dropped
end

-- Too many are set aside: the oldest go, those first after which a submit may run the request anyhow. A flood of failures
-- must not let a killer out.
local function trim_quarantine(keep, most)
  local surplus = math.min(redis.call('ZCARD', quarantine_name()) - keep, most)
  if surplus <= 0 then return end
  local free, kept = {}, {}
  for _, key in ipairs(redis.call('ZRANGE', quarantine_name(), 0, 99)) do
    local list = BLOCKING[look_at(key, 'quarantined').quarantined or ''] and kept or free
    list[#list + 1] = key
  end
  for i = 1, surplus do
    local key = free[i] or kept[i - #free]
    if not key then break end
    erase(key)
    readmit(key)
  end
end

-- RQ's own commands that delete a job: a JSON list of commands, each a list of strings.
local function dismiss(commands)
  for _, command in ipairs(cjson.decode(commands)) do redis.call(unpack(command)) end
end

-- Bytes of what is stored, and of that what is sticky.
local function add_bytes(size, is_sticky)
  redis.call('HINCRBY', stats_name('cache'), 'bytes', int(size))
  if is_sticky then redis.call('HINCRBY', stats_name('cache'), 'sticky_bytes', int(size)) end
end

local function is_sticky_result(key) return tonumber(redis.call('ZSCORE', results_name(), key) or 0) == math.huge end

-- `reason`: expired, cleared, lost (its value is gone before its time: the server evicted it, or somebody deleted it) or
-- replaced by a newer one.
local function drop_index(key, reason)
  local size, is_sticky = redis.call('ZSCORE', sizes_name(), key), is_sticky_result(key)
  redis.call('ZREM', results_name(), key)
  if size then
    redis.call('ZREM', sizes_name(), key)
    add_bytes(0 - tonumber(size), is_sticky)
    count('removals', reason)
  end
end

local function drop_result(key, reason)
  local stored = redis.call('HMGET', result_name(key), 'owner', 'chunks')
  for n = 0, (tonumber(stored[2]) or 0) - 1 do redis.call('UNLINK', chunk_name(key, stored[1], n)) end
  redis.call('UNLINK', result_name(key))
  drop_index(key, reason or 'replaced')
  return drop_aliases(key)
end

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

-- In steps, because unpack has a limit.
local function copy_hash(from, to)
  local flat = redis.call('HGETALL', from)
  for i = 1, #flat, 4000 do redis.call('HSET', to, unpack(flat, i, math.min(i + 3999, #flat))) end
end

-- Follow-ups: requests about a request that has ended, each given as its kind and six values. The payloads go with them; a
-- copy, where the request may run again. What else they must know is in `about`, field and value. They belong to the trace of
-- the execution that makes them, else to that of the submit.
local function follow(key, follow_ups, fields, is_copy, about)
  for i = 1, #follow_ups - 6, 7 do
    local kind, follow_up, uri, request, job_id, commands, data = unpack(follow_ups, i, i + 6)
    if kind ~= 'callback' then redis.call('ZREM', unattended_name(kind), key) end
    if is_copy or i + 7 < #follow_ups then
      copy_hash(callbacks_name(key), callbacks_name(follow_up))
    elseif redis.call('EXISTS', callbacks_name(key)) == 1 then
      redis.call('RENAME', callbacks_name(key), callbacks_name(follow_up))
      redis.call('PERSIST', callbacks_name(follow_up))
    end
    redis.call('HSET', followup_name(follow_up), 'of', key, unpack(about))
    enter(follow_up, uri, request, job_id, commands, data, fields.queue, tonumber(fields.priority), next_seq(), 0, '0',
      0, 0)
    local context = string.match(fields.traced or '', '^%d+:(.+)$') or fields.trace
    if context then redis.call('HSET', status_name(follow_up), 'trace', context) end
  end
end

-- The life of a stored result, its record and its chunks, all with one deadline. No deadline: sticky.
local function expire_together(key, owner, chunks, deadline_ms)
  for n = 0, chunks - 1 do expire_at(chunk_name(key, owner, n), deadline_ms) end
  expire_at(result_name(key), deadline_ms)
  expire_at(status_name(key), deadline_ms)
  redis.call('ZADD', results_name(), deadline_ms and int(deadline_ms) or '+inf', key)
end

-- The record of an alias lives as long as the root's result.
local function expire_alias(key, deadline_ms)
  redis.call('HSET', status_name(key), 'sticky', deadline_ms and '0' or '1')
  expire_at(status_name(key), deadline_ms)
  redis.call('ZADD', results_name(), deadline_ms and int(deadline_ms) or '+inf', key)
  redis.call('ZADD', sizes_name(), 0, key)
end

-- The root has its result, and these answer with it.
local function complete_aliases(keys, root, deadline_ms)
  for _, key in ipairs(keys) do
    local status = status_name(key)
    redis.call('HSET', status, 'state', 'completed', 'ended_ms', int(now_ms))
    redis.call('HDEL', status, 'redirect', 'failure_ttl_ms', 'hops', 'error', 'kwargs', 'ticket', 'slot', 'ttl_ms',
      'fallback_ttl_ms', 'pushed_ms', 'due_ms', 'lease_ms', 'popped')
    redis.call('ZREM', redirected_name(), key)
    expire_alias(key, deadline_ms)
    wake(key, 'completed')
    event('alias', key, 'completed')
  end
  if #keys > 0 then expire_at(aliases_name(root), deadline_ms) end
end

local function set_deadline(key, deadline_ms)
  local size, was_sticky = tonumber(redis.call('ZSCORE', sizes_name(), key) or 0), is_sticky_result(key)
  if was_sticky ~= not deadline_ms then
    redis.call('HINCRBY', stats_name('cache'), 'sticky_bytes', int(was_sticky and 0 - size or size))
  end
  expire_at(emitted_name(key), deadline_ms)
  local stored = redis.call('HMGET', result_name(key), 'owner', 'chunks')
  expire_together(key, stored[1], tonumber(stored[2]) or 0, deadline_ms)
  for _, alias in ipairs(redis.call('SMEMBERS', aliases_name(key))) do
    local fields = look_at(alias, 'state', 'alias')
    if fields.state == 'completed' and fields.alias == key then expire_alias(alias, deadline_ms) end
  end
  expire_at(aliases_name(key), deadline_ms)
end

-- A hit lengthens a temporary result: sticky for good, or to a later end, never to an earlier one.
local function lengthen(key, sticky, ttl_ms)
  local status = status_name(key)
  local until_ms = redis.call('PEXPIRETIME', status)
  if until_ms >= 0 then
    local wanted_ms = tonumber(redis.call('HGET', status, 'ended_ms')) + ttl_ms
    if sticky then
      redis.call('HSET', status, 'sticky', '1')
      set_deadline(key, nil)
    elseif ttl_ms > 0 and wanted_ms > until_ms then
      set_deadline(key, wanted_ms)
    end
  end
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

-- An alias gives its payloads to who computes.
local function move_payloads(key, root)
  local payloads = redis.call('HGETALL', callbacks_name(key))
  for i = 1, #payloads, 2 do redis.call('HSETNX', callbacks_name(root), payloads[i], payloads[i + 1]) end
  redis.call('UNLINK', callbacks_name(key))
end

-- An alias has the result of its root, whose key comes with it: pieces lie under that.
local function stored_result(key, alias)
  key = alias or key
  local stored = redis.call('HMGET', result_name(key), 'owner', 'envelope', 'bytes')
  if alias then stored[4] = alias end
  return stored
end

-- Chunks that a result names but that are not there; a writer that was slow lost them.
local function chunks_missing(key, owner, chunks)
  local missing = 0
  for n = 0, chunks - 1 do missing = missing + 1 - redis.call('EXISTS', chunk_name(key, owner, n)) end
  return missing
end

-- A result becomes visible: value, state, index and wake-up in one step.
local function commit(key, owner, done_token, sticky, ttl_ms, size_bytes, chunks, envelope, bytes)
  -- An earlier one stands in the index, also when it has expired and the sweep has not looked; its size must not count for
  -- ever.
  if redis.call('ZADD', sizes_name(), 'NX', size_bytes, key) == 0 then
    local old = redis.call('HGET', result_name(key), 'owner')
    if old and old ~= owner then drop_result(key) else drop_index(key, 'expired') end
    redis.call('DEL', result_name(key))
    redis.call('ZADD', sizes_name(), size_bytes, key)
  end
  local is_small = chunks == 0
  redis.call('HSET', result_name(key), 'owner', owner, 'envelope', envelope, is_small and 'bytes' or 'chunks',
    is_small and bytes or chunks)
  redis.call('HSET', status_name(key), 'state', 'completed', 'ended_ms', int(now_ms), 'sticky', sticky and '1' or '0',
    'done_token', done_token)
  -- Of a flight only what readers see stays, and what a repeated submit or complete is known by.
  redis.call('HDEL', status_name(key), 'token', 'exec', 'lease_until', 'progress', 'error', 'quarantined', 'note', 'negative_until', 'kwargs', 'ticket', 'slot', 'ttl_ms',
    'fallback_ttl_ms', 'pushed_ms', 'due_ms', 'lease_ms', 'hops', 'trace', 'popped')
  local deadline_ms = not sticky and now_ms + ttl_ms or nil
  expire_together(key, owner, chunks, deadline_ms)
  add_bytes(size_bytes, sticky)
  wake(key, 'completed', is_small and envelope, bytes)
  complete_aliases(led_by(key), key, deadline_ms)
end

-- Learned run times: an exponentially weighted mean per family, and one over all ('*').
local function learn(family, run_ms)
  local runtimes = stats_name('runtime')
  local known = redis.call('HMGET', runtimes, '*', family)
  local function mean(before) return int(before and before + NEWEST * (run_ms - before) or run_ms) end
  local all, mine = mean(tonumber(known[1] or nil)), mean(tonumber(known[2] or nil))
  if known[1] == all and known[2] == mine then return end
  if known[2] or redis.call('HLEN', runtimes) < MOST_FAMILIES then
    redis.call('HSET', runtimes, '*', all, family, mine)
  else
    redis.call('HSET', runtimes, '*', all)
  end
end

-- Tags stand in the record with a line break before and behind each.
local function has_tag(tags, tag)
  return tags and string.find(tags, '\n' .. tag .. '\n', 1, true) ~= nil
end

-- The index of each tag, paid by requests with tags only. Nothing tells it that a record has expired, so each request that
-- comes looks at the two that nobody has looked at for longest: the indexes never hold many more than are alive.
local function index_tags(key, tags)
  for _, entry in ipairs(redis.call('ZRANGE', tagged_name(), 0, 1)) do
    local old, old_tags = string.match(entry, '^([^\n]*)(.*)$')
    local its_tags = look_at(old, 'tags').tags
    if its_tags == old_tags then
      redis.call('ZADD', tagged_name(), int(now_us), entry)
    else
      redis.call('ZREM', tagged_name(), entry)
      for tag in string.gmatch(old_tags, '[^\n]+') do
        if not has_tag(its_tags, tag) then redis.call('ZREM', tag_name(tag), old) end
      end
    end
  end
  redis.call('HSET', status_name(key), 'tags', tags)
  redis.call('ZADD', tagged_name(), int(now_us), key .. tags)
  for tag in string.gmatch(tags, '[^\n]+') do redis.call('ZADD', tag_name(tag), int(now_us), key) end
end

-- Whether an identity (version, operation, URI) belongs to a route: its operation, or the beginning of its path, with or
-- without the host. The pattern ends in a place: what stands there must begin something new.
local function is_on_route(identity, route, pattern)
  local operation, uri = string.match(identity, '^[^\n]*\n([^\n]*)\n(.*)$')
  if not operation then return false end
  if operation ~= '' then return operation == route end
  uri = string.gsub(uri, '^%a[%w+.-]*://', '')
  uri = string.gsub(uri, '^[^/?#@]*@', '')
  local stop = string.match(uri, pattern)
  return stop and (stop == #uri + 1 or string.find(uri, '^[/?#:]', stop) ~= nil) or false
end

-- The rank behind the last entry that a walk has seen. When that has moved or gone: of its score, so that nothing is left
-- out.
local function rank_behind(index, score, member, from_end)
  if redis.call('ZSCORE', index, member) == score then
    return redis.call(from_end and 'ZREVRANK' or 'ZRANK', index, member) + 1
  end
  if from_end then return redis.call('ZCOUNT', index, '(' .. score, '+inf') end
  return redis.call('ZCOUNT', index, '-inf', '(' .. score)
end
