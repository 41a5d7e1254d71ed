-- Results: stored, found, kept, dropped.

-- Bytes of what is stored, and of that what is sticky.
local function add_bytes(size, is_sticky)
  redis.call('HINCRBY', stats_name('cache'), 'bytes', int(size))
  if is_sticky then redis.call('HINCRBY', stats_name('cache'), 'sticky_bytes', int(size)) end
end

local function is_sticky_result(key) return tonumber(redis.call('ZSCORE', results_name(), key) or 0) == math.huge end

-- `reason`: expired, cleared, lost (its value is gone before its time: the server evicted it, or somebody deleted it) or
-- replaced by a newer one.
local function drop_index(key, reason)
  local size, is_sticky = redis.call('ZSCORE', sizes_name(), key), is_sticky_result(key)
  redis.call('ZREM', results_name(), key)
  if size then
    redis.call('ZREM', sizes_name(), key)
    add_bytes(0 - tonumber(size), is_sticky)
    count('removals', reason)
  end
end

local function drop_result(key, reason)
  local stored = redis.call('HMGET', result_name(key), 'owner', 'chunks')
  for n = 0, (tonumber(stored[2]) or 0) - 1 do redis.call('UNLINK', chunk_name(key, stored[1], n)) end
  redis.call('UNLINK', result_name(key))
  drop_index(key, reason or 'replaced')
  return drop_aliases(key)
end

-- The life of a stored result, its record and its chunks, all with one deadline. No deadline: sticky.
local function expire_together(key, owner, chunks, deadline_ms)
  for n = 0, chunks - 1 do expire_at(chunk_name(key, owner, n), deadline_ms) end
  expire_at(result_name(key), deadline_ms)
  expire_at(status_name(key), deadline_ms)
  redis.call('ZADD', results_name(), deadline_ms and int(deadline_ms) or '+inf', key)
end

local function set_deadline(key, deadline_ms)
  local size, was_sticky = tonumber(redis.call('ZSCORE', sizes_name(), key) or 0), is_sticky_result(key)
  if was_sticky ~= not deadline_ms then
    redis.call('HINCRBY', stats_name('cache'), 'sticky_bytes', int(was_sticky and 0 - size or size))
  end
  expire_at(emitted_name(key), deadline_ms)
  local stored = redis.call('HMGET', result_name(key), 'owner', 'chunks')
  expire_together(key, stored[1], tonumber(stored[2]) or 0, deadline_ms)
  for _, alias in ipairs(redis.call('SMEMBERS', aliases_name(key))) do
    local fields = look_at(alias, 'state', 'alias')
    if fields.state == 'completed' and fields.alias == key then expire_alias(alias, deadline_ms) end
  end
  expire_at(aliases_name(key), deadline_ms)
end

-- A hit lengthens a temporary result: sticky for good, or to a later end, never to an earlier one.
local function lengthen(key, sticky, ttl_ms)
  local status = status_name(key)
  local until_ms = redis.call('PEXPIRETIME', status)
  if until_ms >= 0 then
    local wanted_ms = tonumber(redis.call('HGET', status, 'ended_ms')) + ttl_ms
    if sticky then
      redis.call('HSET', status, 'sticky', '1')
      set_deadline(key, nil)
    elseif ttl_ms > 0 and wanted_ms > until_ms then
      set_deadline(key, wanted_ms)
    end
  end
end

-- An alias has the result of its root, whose key comes with it: pieces lie under that.
local function stored_result(key, alias)
  key = alias or key
  local stored = redis.call('HMGET', result_name(key), 'owner', 'envelope', 'bytes')
  if alias then stored[4] = alias end
  return stored
end

-- Chunks that a result names but that are not there; a writer that was slow lost them.
local function chunks_missing(key, owner, chunks)
  local missing = 0
  for n = 0, chunks - 1 do missing = missing + 1 - redis.call('EXISTS', chunk_name(key, owner, n)) end
  return missing
end

-- A result becomes visible: value, state, index and wake-up in one step.
local function commit(key, owner, done_token, sticky, ttl_ms, size_bytes, chunks, envelope, bytes)
  -- An earlier one stands in the index, also when it has expired and the sweep has not looked; its size must not count for
  -- ever.
  if redis.call('ZADD', sizes_name(), 'NX', size_bytes, key) == 0 then
    -- RARE
    local old = redis.call('HGET', result_name(key), 'owner')
    if old and old ~= owner then drop_result(key) else drop_index(key, 'expired') end
    redis.call('DEL', result_name(key))
    redis.call('ZADD', sizes_name(), size_bytes, key)
    -- /RARE
  end
  local is_small = chunks == 0
  redis.call('HSET', result_name(key), 'owner', owner, 'envelope', envelope, is_small and 'bytes' or 'chunks',
    is_small and bytes or chunks)
  redis.call('HSET', status_name(key), 'state', 'completed', 'ended_ms', int(now_ms), 'sticky', sticky and '1' or '0',
    'done_token', done_token)
  -- Of a flight only what readers see stays, and what a repeated submit or complete is known by.
  redis.call('HDEL', status_name(key), 'token', 'exec', 'lease_until', 'progress', 'error', 'quarantined', 'note', 'negative_until', 'kwargs', 'ticket', 'slot', 'ttl_ms',
    'fallback_ttl_ms', 'pushed_ms', 'due_ms', 'lease_ms', 'hops', 'trace', 'popped')
  local deadline_ms = not sticky and now_ms + ttl_ms or nil
  expire_together(key, owner, chunks, deadline_ms)
  add_bytes(size_bytes, sticky)
  wake(key, 'completed', is_small and envelope, bytes)
  if redis.call('EXISTS', aliases_name(key)) == 1 then
    -- RARE
    complete_aliases(led_by(key), key, deadline_ms)
    -- /RARE
  end
end

-- Weight of the newest run in the learned run time, and the most families that are learned.
local NEWEST, MOST_FAMILIES = 0.2, 1000

-- Learned run times: an exponentially weighted mean per family, and one over all ('*').
local function learn(family, run_ms)
  local runtimes = stats_name('runtime')
  local known = redis.call('HMGET', runtimes, '*', family)
  local function mean(before) return int(before and before + NEWEST * (run_ms - before) + 0.5 or run_ms) end
  local all, mine = mean(tonumber(known[1] or nil)), mean(tonumber(known[2] or nil))
  if known[1] == all and known[2] == mine then return end
  if known[2] or redis.call('HLEN', runtimes) < MOST_FAMILIES then
    redis.call('HSET', runtimes, '*', all, family, mine)
  else
    redis.call('HSET', runtimes, '*', all)
  end
end
