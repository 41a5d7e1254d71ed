-- complete: store the result and wake every waiter. Only the holder of the token may.
--
-- Life of the result: what the request says, else the route, else the manager that submitted it.
--
-- FLAGS allow-oom
-- KEYS status      hash   state, token, ...
-- ARGV prefix      str    of every key of ours
-- ARGV key         str    the request's key
-- ARGV token       str    fencing token given at start; the chunks are stored under it
-- ARGV sticky      0|1    the route's wish
-- ARGV ttl_ms      int    the route's wish; 0 = none
-- ARGV family      str    under which the run time is learned
-- ARGV job         str    RQ's job hash to delete; '' = an RQ worker does that
-- ARGV size_bytes  int    stored size
-- ARGV chunks      int    0 = the bytes are in the envelope
-- ARGV envelope    str    what the bytes are, a line for each field
-- ARGV bytes       bytes  of a small result
-- ARGV follow_up   bytes  the callback: kind, key, identity, request, job id, RQ's commands, data, and for how many ms it
--   may need the chunks, to the end. Nothing: there is none. Only '': the caller gets the payloads
--
-- Returns {'stored', payloads} | {'already', payloads} | {'lost', state} | {'torn', missing}

local status = KEYS[1]
local key, token, sticky, ttl_ms = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local family, job, size_bytes, chunks = ARGV[6], ARGV[7], ARGV[8], tonumber(ARGV[9])
local envelope, bytes = ARGV[10], ARGV[11]
local follow_up = {unpack(ARGV, 12)}

-- How long the payloads that the caller gets can be had again, should the answer be lost.
local HANDED_MS = 60000

local claim = record(key, 'state', 'token', 'sticky', 'ttl_ms', 'fallback_ttl_ms', 'started_ms', 'queue', 'priority',
  'slot', 'est_ms', 'done_token', 'limit', 'pushed_ms', 'emitted', 'trace', 'traced')

-- They lie under a name of this attempt: who submits the request anew must not find them.
local handed = follow_up[1] == '' and callbacks_name(key .. ':' .. token)

if claim.state == 'completed' and claim.done_token == token then
  return {'already', handed and redis.call('HVALS', handed)}
end
if claim.state ~= 'in_progress' or claim.token ~= token then
  -- RARE
  count_refusal(claim, token)
  return {'lost', claim.state or 'unknown'}
  -- /RARE
end
if chunks > 0 then
  -- RARE
  local missing = chunks_missing(key, token, chunks)
  if missing > 0 then return {'torn', missing} end
  -- /RARE
end

local asked_ms = tonumber(claim.ttl_ms) or 0
local keep = claim.sticky == '1' or (sticky == '1' and asked_ms == 0)
local life_ms = asked_ms
if life_ms == 0 then life_ms = ttl_ms end
if life_ms == 0 then life_ms = tonumber(claim.fallback_ttl_ms) end

make_room(key, claim)
commit(key, token, token, keep, life_ms, size_bytes, chunks, envelope, bytes)
if claim.emitted then expire_at(emitted_name(key), not keep and now_ms + life_ms or nil) end
local payloads
if handed then
  payloads = redis.call('HVALS', callbacks_name(key))
  if #payloads > 0 then
    redis.call('RENAME', callbacks_name(key), handed)
    redis.call('PEXPIRE', handed, HANDED_MS)
  end
elseif follow_up[1] then
  -- The callback has the result in a place of its own, so neither a short life nor a forget takes it away. Pieces are too
  -- large for that: they live longer.
  -- RARE
  local is_small, needed_ms = chunks == 0, tonumber(follow_up[8])
  follow(key, follow_up, claim, false, {'owner', token, 'envelope', envelope, is_small and 'bytes' or 'chunks',
    is_small and bytes or int(chunks)})
  if not keep and life_ms < needed_ms then
    for n = 0, chunks - 1 do expire_at(chunk_name(key, token, n), now_ms + needed_ms) end
  end
  -- /RARE
end
local gone = {callbacks_name(key)}
if job ~= '' then gone[2] = job end
if claim.traced then gone[#gone + 1] = traces_name(key) end
redis.call('UNLINK', unpack(gone))
learn(family, now_ms - tonumber(claim.started_ms))
count_end('completed', claim, family, size_bytes)
event('complete', key, 'completed')
return {'stored', payloads}
