-- locate: the record with the request's exact position and the time until it is done.
--
-- No scan of the line: the position is a rank, the time ahead a sum of stored sums. What runs now is at most one
-- request for each worker; the first LOOKED_AT of them count.
--
-- KEYS status   hash  the record
-- ARGV prefix   str   of every key of ours
-- ARGV key      str   the request's key
-- ARGV workers  str   names of the sets of RQ's workers, to the end
--
-- Returns {'found', record, position, eta_ms} | {'unknown'}
-- Returns also: position 0 in progress, -1 ended; eta_ms -1 unknown.

local status = KEYS[1]
local key, workers = ARGV[2], {unpack(ARGV, 3)}

local LOOKED_AT = 100

local claim, at = record(key, 'state', 'queue', 'slot', 'est_ms', 'started_ms', 'alias'), key
-- What is ahead of an alias is what is ahead of its root.
if claim.state == 'pending' and claim.alias then
  at = claim.alias
  claim = record(at, 'state', 'queue', 'slot', 'est_ms', 'started_ms')
  claim.state = claim.state or 'unknown'
end

-- Sets of RQ's name the keys of worker hashes; the hash of a dead worker expires.
local function live_workers()
  local live, seen = 0, {}
  for _, set in ipairs(workers) do
    for _, worker in ipairs(redis.call('SMEMBERS', set)) do
      if not seen[worker] and redis.call('EXISTS', worker) == 1 then live = live + 1 end
      seen[worker] = true
    end
  end
  return math.max(live, 1)
end

local function left_of(fields)
  return math.max((tonumber(fields.est_ms) or 0) - (now_ms - tonumber(fields.started_ms)), 0)
end

local function running_ms()
  local sum = 0
  for _, other in ipairs(redis.call('ZRANGE', leases_name(), 0, LOOKED_AT - 1)) do
    local run = record(other, 'queue', 'est_ms', 'started_ms')
    if run.queue == claim.queue and run.started_ms then sum = sum + left_of(run) end
  end
  return sum
end

if not claim.state then return {'unknown'} end
local position, eta_ms = -1, -1
local est_ms = tonumber(claim.est_ms) or 0
if claim.state == 'in_progress' then
  position = 0
  if est_ms > 0 then eta_ms = left_of(claim) end
elseif claim.state == 'pending' then
  position = (redis.call('ZRANK', pending_name(claim.queue), at) or -2) + 1
  if est_ms > 0 then
    eta_ms = (running_ms() + load_before(claim.queue, claim.slot) + est_ms) / live_workers()
  end
end
return {'found', answer_fields(key), position, int(eta_ms)}
