-- redirect: the attempt ends because another request, the target, has the answer. The target was submitted before, by a
-- call of its own; what has become of it since decides.
--
-- An alias leads straight to its root, however long the chain was: who led here before leads there from now on. So nothing
-- is ever walked, and a link in the middle can be cancelled or vanish without harm to the others.
--
-- FLAGS allow-oom
-- KEYS status          hash   state, token, ...
-- ARGV prefix          str    of every key of ours
-- ARGV key             str    the request's key
-- ARGV token           str    fencing token given at start; the same one again answers 'already'
-- ARGV target          str    key of the request that has, or will have, the answer
-- ARGV failure_ttl_ms  int    how long the record can be inspected when the target ends without a result
-- ARGV submitted       0|1    0 = only look whether it may be done, before the target is submitted: 'gone' says yes
-- ARGV job             str    RQ's job hash to delete; '' = an RQ worker does that
-- ARGV follow_ups      str    who is told when the target has ended: a kind and six values each, to the end
--
-- Returns {'aliased'} | {'linked'} | {'failed'} | {'cancelled'} | {'gone'} | {'full'} | {'loop', uris} | {'endless'}
-- Returns {'already'} | {'lost', state}
-- Returns also: aliased the target's result answers now; linked it will; failed, cancelled as the target did; gone the
-- target has no record or no result: submit it; full the target has as many aliases as it may have; uris of the loop.

local status = KEYS[1]
local key, token, target, failure_ttl_ms, submitted, job = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local follow_ups = {unpack(ARGV, 8)}

-- Redirects in a row. Whoever makes a new target at each step would go on for ever.
local MOST_HOPS = 20
local IN_FLIGHT = {pending = true, in_progress = true}

local claim = record(key, 'state', 'token', 'queue', 'slot', 'est_ms', 'limit', 'sticky', 'ttl_ms',
  'fallback_ttl_ms', 'hops', 'alias', 'redirected_by', 'priority', 'trace', 'traced')

if claim.alias and claim.redirected_by == token then return {'already'} end
if claim.state ~= 'in_progress' or claim.token ~= token then return {'lost', claim.state or 'unknown'} end

local aim = look_at(target, 'state', 'alias', 'error', 'negative_until')
-- What has ended without a result has ended by itself, whoever it led to.
local root = aim.state ~= 'failed' and aim.state ~= 'cancelled' and aim.alias or target

-- The targets one after the other, as they were named; one that has vanished ends the list.
local function loop()
  local uris, at = {}, key
  for _ = 0, MOST_HOPS + 1 do
    local fields = look_at(at, 'uri', 'uri_2', 'uri_3', 'redirect')
    uris[#uris + 1] = uri_of(fields)
    if at == key and #uris > 1 then break end
    at = at == key and target or fields.redirect
    if not at then break end
  end
  return uris
end

if target == key or IN_FLIGHT[aim.state] and root == key then return {'loop', loop()} end

local hops = (tonumber(claim.hops) or 0) + 1
if hops > MOST_HOPS and aim.state ~= 'completed' then return {'endless'} end
-- Aliases of both will be those of the root. A target that has neither record nor result has none of its own either.
local has_result = aim.state == 'completed' and redis.call('EXISTS', result_name(root)) == 1
if (has_result or IN_FLIGHT[aim.state])
  and redis.call('SCARD', aliases_name(root)) + redis.call('SCARD', aliases_name(key)) >= MOST_ALIASES then
  return {'full'}
end
if submitted == '0' then return {'gone'} end

local function followers(kind)
  local chosen = {}
  for i = 1, #follow_ups, 7 do
    for j = i, follow_ups[i] == kind and i + 6 or 0 do chosen[#chosen + 1] = follow_ups[j] end
  end
  return chosen
end

local outcome
local known = look_at(root, 'state', 'alias', 'sticky', 'ttl_ms', 'fallback_ttl_ms', 'hops')
if has_result then
  outcome = 'aliased'
elseif IN_FLIGHT[aim.state] and IN_FLIGHT[known.state] and not known.alias then
  outcome = 'linked'
elseif aim.state == 'failed' then
  outcome = 'failed'
elseif aim.state == 'cancelled' then
  outcome = 'cancelled'
else
  return {'gone'}
end

land(key, claim)
withdraw_emissions(key)
redis.call('HSET', status, 'state', 'pending', 'redirect', target, 'redirected_by', token, 'failure_ttl_ms',
  failure_ttl_ms)
redis.call('HDEL', status, 'worker', 'hops')
local led = lead_to(key, root)
if outcome == 'linked' then
  redis.call('ZADD', redirected_name(), int(now_ms), key)
  redis.call('HSET', status_name(root), 'hops', int(math.max(hops, tonumber(known.hops) or 0)))
  raise_wishes(root, known, tonumber(claim.sticky) or 0, tonumber(claim.ttl_ms) or 0,
    tonumber(claim.fallback_ttl_ms) or 0)
  move_payloads(key, root)
elseif outcome == 'aliased' then
  lengthen(root, claim.sticky == '1', tonumber(claim.ttl_ms) or 0)
  local until_ms = redis.call('PEXPIRETIME', result_name(root))
  complete_aliases(led, root, until_ms >= 0 and until_ms or nil)
  -- As complete does it: the callback has the result in a place of its own, and pieces live for long enough.
  local stored, needed_ms = redis.call('HMGET', result_name(root), 'owner', 'envelope', 'bytes', 'chunks'),
    now_ms + tonumber(failure_ttl_ms)
  follow(key, followers('callback'), claim, false, {'root', root, 'owner', stored[1], 'envelope', stored[2],
    stored[3] and 'bytes' or 'chunks', stored[3] or stored[4]})
  if #follow_ups > 0 and until_ms >= 0 and until_ms < needed_ms then
    for n = 0, tonumber(stored[4] or 0) - 1 do expire_at(chunk_name(root, stored[1], n), needed_ms) end
  end
  redis.call('UNLINK', callbacks_name(key))
else
  end_aliases(led, outcome, aim.error, aim.negative_until)
  redis.call('UNLINK', aliases_name(root))
  if outcome == 'failed' then
    follow(key, followers('failure'), claim, false, {'error', aim.error or ''})
    redis.call('PEXPIRE', callbacks_name(key), failure_ttl_ms)
  else
    redis.call('UNLINK', callbacks_name(key))
  end
end
if job ~= '' then redis.call('UNLINK', job) end
count('executions', 'redirected')
if outcome == 'linked' then event('redirect', key, 'pending') end
return {outcome}
