-- renew: keep an attempt for another lease, and note how far it is; then wake those who follow.
--
-- FLAGS allow-oom
-- KEYS status    hash   state, token, lease_until
-- ARGV prefix    str    of every key of ours
-- ARGV key       str    the request's key
-- ARGV token     str    fencing token given at start
-- ARGV lease_ms  int    counted from the server's now
-- ARGV progress  bytes  '' = unchanged
--
-- Returns {'renewed', lease_until} | {'lost', state}

local status = KEYS[1]
local key, token, lease_ms, progress = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]

local claim = record(key, 'state', 'token', 'done_token')

if claim.state ~= 'in_progress' or claim.token ~= token then
  count_refusal(claim, token)
  return {'lost', claim.state or 'unknown'}
end

local lease_until = int(now_ms + lease_ms)
redis.call('ZADD', leases_name(), lease_until, key)
redis.call('HSET', status, 'lease_until', lease_until, 'lease_ms', int(lease_ms))
if progress ~= '' then
  redis.call('HSET', status, 'progress', progress)
  redis.call('PUBLISH', told_name(key), 'progress')
end
return {'renewed', lease_until}
