-- invalidate: forget cached results that carry a tag, in bounded steps. What is in flight or has failed stays.
--
-- FLAGS allow-oom
-- KEYS index   zset  key by the time it got the tag, us
-- ARGV prefix  str   of every key of ours
-- ARGV tag     str   the tag
-- ARGV limit   int   entries of one step
-- ARGV cursor  str   the step before's answer; '' = from the start
--
-- Returns {'invalidated', n, looked_at, cursor}
-- Returns also: cursor is the last one that was left where it is, with its score.

local index = KEYS[1]
local tag, limit, cursor = ARGV[2], tonumber(ARGV[3]), ARGV[4]

local score, member = string.match(cursor, '^(%S+) (%S+)$')
local rank = score and rank_behind(index, score, member, false) or 0
local rows = redis.call('ZRANGE', index, int(rank), int(rank + limit - 1), 'WITHSCORES')

local dropped = 0
for key, its_score in pairs_of(rows) do
  local fields = look_at(key, 'state', 'tags')
  if not has_tag(fields.tags, tag) then
    redis.call('ZREM', index, key)
  elseif fields.state == 'completed' then
    drop_result(key, 'cleared')
    redis.call('ZREM', index, key)
    erase(key)
    event('forget', key, 'unknown')
    dropped = dropped + 1
  else
    cursor = its_score .. ' ' .. key
  end
end
return {'invalidated', dropped, #rows / 2, cursor}
