-- need: the attempt ends because it needs the results of other requests, which are in flight. It waits without a worker; the
-- script that ends the last of them calls it up, as one that gets a place under a limit.
--
-- It counts neither as attempt nor as crash. RQ's scheduler has its ticket for later, should one of the others vanish.
--
-- FLAGS allow-oom
-- KEYS status    hash   state, token, ...
-- ARGV prefix    str    of every key of ours
-- ARGV key       str    the request's key
-- ARGV token     str    fencing token given at start
-- ARGV job_id    str    the ticket with which it waits; the same one again answers 'already'
-- ARGV commands  str    RQ's own commands that schedule this ticket
-- ARGV data      bytes  what is not text in them
-- ARGV recall    str    RQ's own commands that queue it at the front, once all have ended
-- ARGV delay_ms  int    when RQ's scheduler queues it anyway
-- ARGV job       str    RQ's job hash of the old ticket, to delete; '' = an RQ worker does that
-- ARGV others    str    keys of what is needed, to the end
--
-- Returns {'waiting'} | {'ready'} | {'loop', uris} | {'full'} | {'already'} | {'lost', state}
-- Returns also: ready none of them is in flight any more; full one of them has as many who wait as it may have.

local status = KEYS[1]
local key, token, job_id, commands, data = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local recall, delay_ms, job, others = ARGV[7], tonumber(ARGV[8]), ARGV[9], {unpack(ARGV, 10)}

-- Of those who wait for those who are needed, and so on, no more are looked at.
local LOOKED_AT = 1000

local claim = record(key, 'state', 'token', 'job_id', 'queue', 'priority', 'ticket', 'slot', 'est_ms', 'limit', 'uri',
  'uri_2', 'uri_3')

if claim.job_id == job_id then return {'already'} end
if claim.state ~= 'in_progress' or claim.token ~= token then
  count_refusal(claim, token)
  return {'lost', claim.state or 'unknown'}
end

-- Who answers for each that is in flight, once.
local needed, known = {}, {}
for _, other in ipairs(others) do
  local fields = look_at(other, 'state', 'alias')
  local root = fields.alias or other
  if (fields.state == 'pending' or fields.state == 'in_progress') and not known[root] then
    needed[#needed + 1], known[root] = root, true
  end
end

-- The chain from me to whoever needs me, as URIs; nil when there is none.
local function loop()
  local reached, from, n = {}, {}, 0
  for _, other in ipairs(needed) do reached[#reached + 1] = other end
  while n < #reached and n < LOOKED_AT do
    n = n + 1
    local at = reached[n]
    if at == key then
      local chain = {}
      while at do
        table.insert(chain, 1, uri_of(look_at(at, 'uri', 'uri_2', 'uri_3')))
        at = from[at]
      end
      table.insert(chain, 1, uri_of(claim))
      return chain
    end
    for other in string.gmatch(look_at(at, 'needs').needs or '', '[^\n]+') do
      if not known[other] then reached[#reached + 1], known[other], from[other] = other, true, at end
    end
  end
end

if #needed == 0 then return {'ready'} end
local chain = loop()
if chain then return {'loop', chain} end
for _, other in ipairs(needed) do
  if redis.call('SCARD', aliases_name(other)) >= MOST_ALIASES then return {'full'} end
end

requeue(key, claim, job_id, commands, data, job)
redis.call('HINCRBY', status, 'attempts', -1)
redis.call('HSET', status, 'needs', '\n' .. table.concat(needed, '\n') .. '\n', 'recall', recall, 'recall_data', data,
  'due_ms', int(now_ms + delay_ms))
for _, other in ipairs(needed) do
  redis.call('SADD', aliases_name(other), key)
  redis.call('PERSIST', aliases_name(other))
end
count('executions', 'waiting')
event('need', key, 'pending')
return {'waiting'}
