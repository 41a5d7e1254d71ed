-- clear: forget cached results in bounded steps, soonest to expire first. Sticky ones stand at +inf.
--
-- FLAGS allow-oom
-- KEYS results  zset  key by expiry
-- ARGV prefix   str   of every key of ours
-- ARGV to       str   '+inf' = all; '(+inf' = temporary only
-- ARGV limit    int   entries of one step
-- ARGV route    str   only these: an operation, or what pattern was made of; '' = any
-- ARGV pattern  str   Lua pattern of the route
-- ARGV age_ms   int   only what was computed so long ago; 0 = any
-- ARGV cursor   str   the step before's answer; '' = from the start
--
-- Returns {'cleared', n, looked_at, cursor}
-- Returns also: cursor is the last one that was left where it is, with its score.

local results = KEYS[1]
local to, limit, route, pattern, age_ms = ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5], tonumber(ARGV[6])
local cursor = ARGV[7]

local score, member = string.match(cursor, '^(%S+) (%S+)$')
local rank = score and rank_behind(results, score, member, false) or 0
local most = redis.call('ZCOUNT', results, '-inf', to) - rank
local rows = {}
if most > 0 then
  rows = redis.call('ZRANGE', results, int(rank), int(rank + math.min(limit, most) - 1), 'WITHSCORES')
end

local function is_wanted(key, fields)
  if route == '' and age_ms == 0 then return true end
  -- Of a record that is gone nothing can be said; when its result is gone too, it is only an entry.
  if not fields.state then return redis.call('EXISTS', result_name(key)) == 0 end
  if age_ms > 0 and (tonumber(fields.ended_ms) or now_ms) > now_ms - age_ms then return false end
  return route == '' or is_on_route(uri_of(fields), route, pattern)
end

local cleared = 0
for key, its_score in pairs_of(rows) do
  local fields = record(key, 'state', 'ended_ms', 'uri', 'uri_2', 'uri_3')
  if not is_wanted(key, fields) then
    cursor = its_score .. ' ' .. key
  else
    cleared = cleared + drop_result(key, 'cleared')
    if fields.state == 'completed' then
      erase(key)
      event('forget', key, 'unknown')
      cleared = cleared + 1
    end
  end
end
return {'cleared', cleared, #rows / 2, cursor}
