-- put: store a result without an execution, whatever the request's state is. An attempt that runs loses its claim.
--
-- KEYS status      hash   state, uri, ...
-- ARGV prefix      str    of every key of ours
-- ARGV key         str    the request's key
-- ARGV uri         str    identity: what the key is the hash of
-- ARGV request     bytes  packed beside the identity
-- ARGV owner       str    made by the caller; the chunks are stored under it
-- ARGV queue       str    logical queue of the request
-- ARGV sticky      0|1    keep the result without TTL
-- ARGV ttl_ms      int    life of the result
-- ARGV size_bytes  int    stored size
-- ARGV chunks      int    0 = the bytes are in the envelope
-- ARGV envelope    str    what the bytes are, a line for each field
-- ARGV bytes       bytes  of a small result
-- ARGV tags        str    a line each, with a line break before the first; '' = none
--
-- Returns {'stored'} | {'conflict', uri} | {'torn', missing}

local status = KEYS[1]
local key, uri, request, owner, queue = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local sticky, ttl_ms, size_bytes, chunks = ARGV[7], tonumber(ARGV[8]), ARGV[9], tonumber(ARGV[10])
local envelope, bytes, tags = ARGV[11], ARGV[12], ARGV[13]

local claim = record(key, 'state', 'uri', 'uri_2', 'uri_3', 'queue', 'slot', 'est_ms', 'sticky', 'ttl_ms', 'limit',
  'done_token', 'alias')

if claim.state and uri_of(claim) ~= uri then return {'conflict', uri_of(claim)} end
-- Sent again because its reply was lost: storing twice would count the size twice and lengthen the life.
if claim.state == 'completed' and redis.call('HGET', result_name(key), 'owner') == owner then return {'stored'} end
local missing = chunks_missing(key, owner, chunks)
if missing > 0 then return {'torn', missing} end

-- Who waits for it in flight asked for this much life, whoever brings the value.
if claim.state == 'pending' or claim.state == 'in_progress' then
  if claim.sticky == '1' then sticky = '1' end
  ttl_ms = math.max(ttl_ms, tonumber(claim.ttl_ms) or 0)
end
redis.call('HSET', status, 'request', request, uri_fields(uri))
if claim.state then redis.call('HDEL', status, 'tags') end
if tags ~= '' then index_tags(key, tags) end
if claim.alias then break_away(key, claim.alias) end
if claim.state then
  land(key, claim)
else
  redis.call('HSET', status, 'queue', queue, 'priority', '1', 'submitted_ms', int(now_ms))
end
readmit(key)
redis.call('UNLINK', callbacks_name(key), emitted_name(key))
-- A result that was evicted still stands in the indexes.
if redis.call('EXISTS', result_name(key)) == 0 then drop_result(key, 'lost') end
commit(key, owner, claim.done_token or owner, sticky == '1', ttl_ms, size_bytes, chunks, envelope, bytes)
event('put', key, 'completed')
return {'stored'}
