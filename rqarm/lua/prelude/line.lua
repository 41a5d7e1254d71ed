-- The line of a queue and what stands ahead of a place in it; the places of a limit.

-- Radix of the load sums: a prefix sum reads at most 2 * RADIX fields and the top level.
local RADIX = 128

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

-- Score of a pending request = priority * STRIDE + ticket. A ticket is a time in microseconds, so it stays below
-- the stride until 2049, and the highest score stays below 2^53.
local STRIDE = 2.5e15

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
    slot = rank .. ':' .. int(n)
  elseif ticket < (tonumber(redis.call('HGET', load, rank .. 'f') or nil) or math.huge) then
    slot = rank .. ':0'
  end
  if est_ms > 0 then add_load(queue, slot, int(est_ms)) end
  return slot
end

-- Answers how many are left in line, if it was in it.
local function leave_line(key, fields)
  local pending = pending_name(fields.queue)
  if fields.state ~= 'in_progress' and redis.call('ZREM', pending, key) == 1 then
    local est_ms, left = tonumber(fields.est_ms) or 0, redis.call('ZCARD', pending)
    if left == 0 then
      redis.call('DEL', load_name(fields.queue))
    elseif est_ms > 0 then
      add_load(fields.queue, fields.slot, int(-est_ms))
    end
    return left
  end
end

-- Requests that one free place or one step of the sweep calls up at the most.
local MOST_CALLED = 100

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
