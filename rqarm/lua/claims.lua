-- claims: what runs, by the end of its lease, and how full the limits are.
--
-- KEYS leases  zset  key by deadline
-- ARGV prefix  str   of every key of ours
-- ARGV offset  int   0 = the one that lapses first
-- ARGV limit   int   entries of a page
--
-- Returns {'page', now_ms, total, overdue, limits, key, record, lease_until, lease_ms, token, limit, ...}
-- Returns also: limits is name, places, running, called, parked, ...

local leases = KEYS[1]
local offset, limit = tonumber(ARGV[2]), tonumber(ARGV[3])

local limits = {}
for name, places in pairs_of(redis.call('HGETALL', limits_name())) do
  local n = #limits
  limits[n + 1], limits[n + 2], limits[n + 3] = name, places, redis.call('ZCARD', running_name(name))
  limits[n + 4], limits[n + 5] = redis.call('ZCARD', called_name(name)), redis.call('ZCARD', parked_name(name))
end
local page = {'page', int(now_ms), redis.call('ZCARD', leases), redis.call('ZCOUNT', leases, '-inf', int(now_ms)),
  limits}
for _, key in ipairs(redis.call('ZRANGE', leases, offset, offset + limit - 1)) do
  local claim = look_at(key, 'state', 'lease_until', 'lease_ms', 'token', 'limit')
  if claim.state == 'in_progress' then
    local n = #page
    page[n + 1], page[n + 2], page[n + 3] = key, answer_fields(key), claim.lease_until or '0'
    page[n + 4], page[n + 5], page[n + 6] = claim.lease_ms or '0', claim.token or '0', claim.limit or ''
  end
end
return page
