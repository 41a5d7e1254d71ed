-- survey: what is cached, in numbers. The times to live are counted in the index; the rest comes from a sample of it, at
-- equal distances, so the work does not grow with the cache.
--
-- KEYS results  zset  key by expiry
-- ARGV prefix   str   of every key of ours
-- ARGV sample   int   entries that are looked at, at the most
-- ARGV largest  int   entries of the list of the largest
-- ARGV bounds   str   JSON list, ms: upper ends of the ranges of times to live, rising
--
-- Returns {'survey', now_ms, temporary, sticky, bytes, counts, largest, sampled}
-- Returns also: counts has one number for each bound and one for what lives longer; largest is key, record, expires_ms,
-- size_bytes, ...; sampled is ended_ms, size_bytes, identity, envelope, ...
-- (of an alias, which has none: redirect)

local results = KEYS[1]
local sample, largest, bounds = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]

local first = redis.call('ZCOUNT', results, '-inf', int(now_ms))
local total = redis.call('ZCARD', results)
local sticky = redis.call('ZCOUNT', results, '+inf', '+inf')

local counts, from = {}, '(' .. int(now_ms)
for i, bound in ipairs(cjson.decode(bounds)) do
  local to = int(now_ms + bound)
  counts[i], from = redis.call('ZCOUNT', results, from, to), '(' .. to
end
counts[#counts + 1] = redis.call('ZCOUNT', results, from, '(+inf')

local top = {}
for _, key in ipairs(redis.call('ZREVRANGE', sizes_name(), 0, largest - 1)) do
  local n = #top
  top[n + 1], top[n + 2] = key, answer_fields(key)
  top[n + 3], top[n + 4] = redis.call('ZSCORE', results, key), redis.call('ZSCORE', sizes_name(), key)
end

local sampled = {}
local taken = math.min(sample, total - first)
for i = 0, taken - 1 do
  local rank = int(first + math.floor(i * (total - first) / taken))
  local key = redis.call('ZRANGE', results, rank, rank)[1]
  local fields = key and look_at(key, 'state', 'ended_ms', 'alias', 'uri', 'uri_2', 'uri_3') or {}
  if fields.state == 'completed' then
    local n = #sampled
    sampled[n + 1], sampled[n + 2] = fields.ended_ms, redis.call('ZSCORE', sizes_name(), key) or '0'
    sampled[n + 3] = uri_of(fields)
    sampled[n + 4] = fields.alias and 'redirect' or redis.call('HGET', result_name(key), 'envelope') or ''
  end
end
return {'survey', int(now_ms), total - first - sticky, sticky, redis.call('HGET', stats_name('cache'), 'bytes') or '0',
  counts, top, sampled}
