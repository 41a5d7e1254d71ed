-- admit: an attempt asks for a place under the limit of its route, before its handler is called. Only a worker knows the
-- routes, so this comes after the start.
--
-- Without a place the attempt is handed back unharmed, as by release, and parked. RQ's scheduler has its ticket for later,
-- should nobody call it up. A place that is kept for somebody who is not here yet is mine when I stand before it in line,
-- or when it was called so long ago that nobody seems to fetch it: its queue may have no workers.
--
-- FLAGS allow-oom
-- KEYS status    hash   state, token, ...
-- ARGV prefix    str    of every key of ours
-- ARGV key       str    the request's key
-- ARGV token     str    fencing token given at start
-- ARGV limit     str    name of the limit
-- ARGV max       int    places under it; who asked last decides for all
-- ARGV job_id    str    the ticket with which it waits; the same one again answers 'parked'
-- ARGV commands  str    RQ's own commands that schedule this ticket
-- ARGV data      bytes  what is not text in them
-- ARGV recall    str    RQ's own commands that queue it at the front, once there is a place
-- ARGV delay_ms  int    when RQ's scheduler queues it anyway
-- ARGV job       str    RQ's job hash of the old ticket, to delete; '' = an RQ worker does that
--
-- Returns {'admitted'} | {'parked'} | {'lost', state}

local status = KEYS[1]
local key, token, limit, max = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local job_id, commands, data, recall, delay_ms, job = ARGV[6], ARGV[7], ARGV[8], ARGV[9], tonumber(ARGV[10]), ARGV[11]

-- How long the place of somebody who was called is kept from those behind it.
local KEPT_MS = 10000

local claim = record(key, 'state', 'token', 'job_id', 'queue', 'priority', 'ticket', 'slot', 'est_ms', 'limit')

if claim.job_id == job_id then return {'parked'} end
if claim.state ~= 'in_progress' or claim.token ~= token then
  count_refusal(claim, token)
  return {'lost', claim.state or 'unknown'}
end
if claim.limit == limit and redis.call('ZSCORE', running_name(limit), key) then return {'admitted'} end

local function score_of(fields)
  return (tonumber(fields.priority) or 2) * STRIDE + (tonumber(fields.ticket) or 0)
end

-- Takes the place of whoever was called and stands furthest behind me. Its ticket is in the queue; when that is delivered,
-- it asks as I do.
local function displace()
  local called = redis.call('ZRANGE', called_name(limit), 0, MOST_CALLED - 1, 'WITHSCORES')
  local last, behind = nil, score_of(claim)
  for i = 1, #called, 2 do
    local score = score_of(look_at(called[i], 'priority', 'ticket'))
    if tonumber(called[i + 1]) < now_ms - KEPT_MS then score = math.huge end
    if score > behind then last, behind = called[i], score end
  end
  if not last then return false end
  redis.call('ZREM', called_name(limit), last)
  redis.call('HDEL', status_name(last), 'limit')
  return true
end

-- Another limit holds it when its route got a new name while it was parked.
if claim.limit then vacate(key, claim.limit) end
claim.limit = nil
redis.call('HSET', limits_name(), limit, int(max))
-- More places than before, or some whose holders vanished: first those who wait.
call_up(limit)
local taken = redis.call('ZCARD', running_name(limit)) + redis.call('ZCARD', called_name(limit))

if taken < max or displace() then
  redis.call('HSET', status, 'limit', limit)
  redis.call('ZADD', running_name(limit), int(now_ms), key)
  return {'admitted'}
end
requeue(key, claim, job_id, commands, data, job)
redis.call('HINCRBY', status, 'attempts', -1)
redis.call('HSET', status, 'limit', limit, 'recall', recall, 'recall_data', data, 'due_ms', int(now_ms + delay_ms))
redis.call('ZADD', parked_name(limit), int(score_of(claim)), key)
count('executions', 'parked')
event('park', key, 'pending')
return {'parked'}
