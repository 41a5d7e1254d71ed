-- conclude: a follow-up has run: a callback, a failure callback, the consumer of the quarantine. Nothing of it is kept.
--
-- FLAGS allow-oom
-- KEYS status  hash  state, token, ...
-- ARGV prefix  str   of every key of ours
-- ARGV key     str   the follow-up's key
-- ARGV token   str   fencing token given at start
-- ARGV job     str   RQ's job hash to delete; '' = an RQ worker does that
--
-- Returns {'concluded'} | {'already'} | {'lost', state}
-- Returns also: already also when somebody forgot it, for then there is nothing left to do either.

local status = KEYS[1]
local key, token, job = ARGV[2], ARGV[3], ARGV[4]

local claim = record(key, 'state', 'token', 'queue', 'slot', 'est_ms', 'limit')

if not claim.state then return {'already'} end
if claim.state ~= 'in_progress' or claim.token ~= token then return {'lost', claim.state} end

-- The pieces of a large result were kept for this: from now on they live as long as the result does.
local about = redis.call('HMGET', followup_name(key), 'of', 'owner', 'chunks')
local of, owner, chunks = about[1], about[2], tonumber(about[3] or nil) or 0
if chunks > 0 then
  local is_there = redis.call('HGET', result_name(of), 'owner') == owner
  local until_ms = is_there and redis.call('PEXPIRETIME', result_name(of)) or now_ms
  for n = 0, chunks - 1 do expire_at(chunk_name(of, owner, n), until_ms >= 0 and until_ms or nil) end
end

make_room(key, claim)
erase(key, job)
wake(key, 'unknown')
count('executions', 'concluded')
event('conclude', key, 'unknown')
return {'concluded'}
