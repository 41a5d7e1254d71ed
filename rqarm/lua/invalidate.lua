-- invalidate: forget cached results that carry a tag, in bounded steps. What is in flight or has failed stays.
--
-- FLAGS allow-oom
-- KEYS index   zset  key by the time it was looked at last, us
-- ARGV prefix  str   of every key of ours
-- ARGV tag     str   the tag
-- ARGV before  str   the first step's answer, for the steps that follow; '' = the first
-- ARGV limit   int   entries of one step
--
-- Returns {'invalidated', n, looked_at, before}

local index = KEYS[1]
local tag, before, limit = ARGV[2], ARGV[3], ARGV[4]

if before == '' then before = int(now_us) end
-- What stays is looked at once in a walk: it gets a score behind the time at which the walk began, also when the clock was
-- set back since.
local behind = int(math.max(now_us, tonumber(before) + 1))

local keys = redis.call('ZRANGEBYSCORE', index, '-inf', before, 'LIMIT', 0, limit)
local dropped = 0
for _, key in ipairs(keys) do
  local fields = look_at(key, 'state', 'tags')
  if not has_tag(fields.tags, tag) then
    redis.call('ZREM', index, key)
  elseif fields.state == 'completed' then
    drop_result(key, 'cleared')
    redis.call('ZREM', index, key)
    redis.call('UNLINK', status_name(key), callbacks_name(key))
    event('forget', key, 'unknown')
    dropped = dropped + 1
  else
    redis.call('ZADD', index, behind, key)
  end
end
return {'invalidated', dropped, #keys, before}
