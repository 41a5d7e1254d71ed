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

-- The record for the caller, as one string: netstrings of RECORD_FIELDS in their order, '-' for a field that is not
-- there. One string, because a client reads it several times faster than a list of fourteen.
local function packed_record(values)
  for i = 1, #RECORD_FIELDS do values[i] = values[i] and #values[i] .. ':' .. values[i] or '-' end
  return table.concat(values, '', 1, #RECORD_FIELDS)
end

local function answer_fields(key)
  return packed_record(redis.call('HMGET', status_name(key), unpack(RECORD_FIELDS)))
end

-- Statistics never stand in the way: a hit is answered also when memory is out.
local function count(family, word)
  redis.pcall('HINCRBY', stats_name(family), word, 1)
end

local function event(verb, key, state)
  redis.pcall('XADD', events_name(), 'MAXLEN', '~', EVENTS_KEPT, '*', 'verb', verb, 'key', key, 'state', state)
end

local function wake(key, state)
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
  if redis.call('ZREM', pending, key) == 1 then
    local est_ms = tonumber(fields.est_ms) or 0
    if est_ms > 0 then add_load(fields.queue, fields.slot, int(-est_ms)) end
    if redis.call('ZCARD', pending) == 0 then redis.call('DEL', load_name(fields.queue)) end
  end
end

-- A claim goes back to pending behind a new ticket. Its place in line is that of the old one.
local function requeue(key, fields, job_id, commands, data)
  leave_line(key, fields)
  redis.call('SET', lock_name(key), job_id)
  redis.call('ZREM', leases_name(), key)
  local ticket, priority = tonumber(fields.ticket), tonumber(fields.priority)
  local slot = line_up(key, fields.queue, priority, ticket, tonumber(fields.est_ms) or 0, fields.slot)
  redis.call('HSET', status_name(key), 'state', 'pending', 'job_id', job_id, 'slot', slot, 'pushed_ms', int(now_ms))
  redis.call('HDEL', status_name(key), 'token', 'exec', 'lease_until', 'worker', 'progress')
  replay(commands, data)
end

-- An execution begins: a token that is higher than every token before, and a lease.
local function begin(key, fields, job_id, exec, worker, lease_ms)
  local token, status = next_seq(), status_name(key)
  leave_line(key, fields)
  redis.call('SET', lock_name(key), job_id)
  redis.call('PERSIST', status)
  redis.call('PERSIST', callbacks_name(key))
  redis.call('ZADD', leases_name(), int(now_ms + lease_ms), key)
  redis.call('HSET', status, 'state', 'in_progress', 'token', int(token), 'exec', exec, 'worker', worker,
    'started_ms', int(now_ms), 'lease_ms', int(lease_ms), 'lease_until', int(now_ms + lease_ms))
  redis.call('HINCRBY', status, 'attempts', 1)
  redis.call('HDEL', status, 'due_ms', 'ended_ms')
  event('start', key, 'in_progress')
end

-- What an execution needs to know, in the order of the answers of start and take.
local function attempt(key)
  return unpack(redis.call('HMGET', status_name(key), 'token', 'attempts', 'request', 'kwargs', 'retries', 'crashes',
    'queue', 'priority'))
end

-- The end of a flight, whatever the end is.
local function land(key, fields)
  leave_line(key, fields)
  redis.call('DEL', lock_name(key))
  redis.call('ZREM', leases_name(), key)
  redis.call('HDEL', status_name(key), 'token', 'exec', 'lease_until', 'progress')
end

local function expire_at(name, deadline_ms)
  if deadline_ms then redis.call('PEXPIREAT', name, int(deadline_ms)) else redis.call('PERSIST', name) end
end

local function set_aside(key, fields, err)
  land(key, fields)
  redis.call('HSET', status_name(key), 'state', 'failed', 'quarantined', '1', 'ended_ms', int(now_ms), 'error', err)
  redis.call('ZADD', quarantine_name(), int(now_ms), key)
  wake(key, 'failed')
end

local function drop_result(key)
  local stored = redis.call('HMGET', result_name(key), 'owner', 'chunks')
  for n = 0, (tonumber(stored[2]) or 0) - 1 do redis.call('UNLINK', chunk_name(key, stored[1], n)) end
  redis.call('UNLINK', result_name(key))
  redis.call('ZREM', results_name(), key)
  local size = redis.call('ZSCORE', sizes_name(), key)
  if size then
    redis.call('ZREM', sizes_name(), key)
    redis.call('HINCRBY', stats_name('cache'), 'bytes', int(-tonumber(size)))
  end
end

-- The life of a stored result, its record and its chunks, all with one deadline. No deadline: sticky.
local function set_deadline(key, deadline_ms)
  local stored = redis.call('HMGET', result_name(key), 'owner', 'chunks')
  for n = 0, (tonumber(stored[2]) or 0) - 1 do expire_at(chunk_name(key, stored[1], n), deadline_ms) end
  expire_at(result_name(key), deadline_ms)
  expire_at(status_name(key), deadline_ms)
  redis.call('ZADD', results_name(), deadline_ms and int(deadline_ms) or '+inf', key)
end

local function stored_result(key)
  return redis.call('HMGET', result_name(key), 'owner', 'envelope', 'bytes')
end

-- Chunks that a result names but that are not there; a writer that was slow lost them.
local function chunks_missing(key, owner, chunks)
  local missing = 0
  for n = 0, chunks - 1 do missing = missing + 1 - redis.call('EXISTS', chunk_name(key, owner, n)) end
  return missing
end

-- A result becomes visible: value, state, index and wake-up in one step.
local function commit(key, owner, sticky, ttl_ms, size_bytes, chunks, envelope, bytes)
  if redis.call('HGET', result_name(key), 'owner') ~= owner then drop_result(key) end
  redis.call('DEL', result_name(key))
  redis.call('HSET', result_name(key), 'owner', owner, 'chunks', chunks, 'envelope', envelope, 'bytes', bytes)
  redis.call('HSET', status_name(key), 'state', 'completed', 'ended_ms', int(now_ms), 'sticky', sticky and '1' or '0')
  redis.call('HDEL', status_name(key), 'error', 'quarantined', 'negative_until', 'kwargs')
  redis.call('UNLINK', callbacks_name(key))
  set_deadline(key, not sticky and now_ms + ttl_ms or nil)
  redis.call('ZADD', sizes_name(), size_bytes, key)
  redis.call('HINCRBY', stats_name('cache'), 'bytes', size_bytes)
  wake(key, 'completed')
end

-- Learned run times: an exponentially weighted mean per family, and one over all ('*').
local function learn(family, run_ms)
  local runtimes = stats_name('runtime')
  for _, name in ipairs({family, '*'}) do
    local known = tonumber(redis.call('HGET', runtimes, name) or nil)
    if known or name == '*' or redis.call('HLEN', runtimes) < MOST_FAMILIES then
      redis.call('HSET', runtimes, name, int(known and known + NEWEST * (run_ms - known) or run_ms))
    end
  end
end
