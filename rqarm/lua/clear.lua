-- clear: forget cached results in bounded steps, soonest to expire first. Sticky ones stand at +inf.
--
-- FLAGS allow-oom
-- KEYS results  zset  key by expiry
-- ARGV prefix   str   of every key of ours
-- ARGV to       str   '+inf' = all; '(+inf' = temporary only
-- ARGV limit    int   entries of one step
--
-- Returns {'cleared', n, looked_at}

local results = KEYS[1]
local to, limit = ARGV[2], ARGV[3]

local keys = redis.call('ZRANGEBYSCORE', results, '-inf', to, 'LIMIT', 0, limit)

local cleared = 0
for _, key in ipairs(keys) do
  local state = redis.call('HGET', status_name(key), 'state')
  cleared = cleared + drop_result(key)
  if state == 'completed' then
    redis.call('UNLINK', status_name(key), callbacks_name(key))
    event('forget', key, 'unknown')
    cleared = cleared + 1
  end
end
return {'cleared', cleared, #keys}
