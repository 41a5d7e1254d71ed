-- Requests that another one answers, or that need what another one answers.

-- Aliases of a root, and those who need it. Its end lands all of them in one step, and so does a forget: each costs the
-- server some 30 us.
local MOST_ALIASES = 1000

-- Redirects. An alias is a request that ended its attempt because another one, its root, has or will have the answer. In
-- flight it is pending and not in line; it stands in `redirected` and in the root's set `aliases`. Completed it has no result
-- of its own; its record leads to the root's and lives as long. The set outlives the root's end only then.
local function break_away(key, root)
  redis.call('SREM', aliases_name(root), key)
  redis.call('ZREM', redirected_name(), key)
  redis.call('HDEL', status_name(key), 'alias', 'redirect', 'failure_ttl_ms')
end

-- Whether the root of an alias in flight is in flight still.
local function is_led(fields)
  local root = look_at(fields.alias, 'state', 'alias')
  return (root.state == 'pending' or root.state == 'in_progress') and not root.alias
end

-- One of those that a request needs has ended, or leads elsewhere. Behind the last of them it is called up, and looks
-- again what has become of all.
local function satisfy(key, ended)
  redis.call('SREM', aliases_name(ended), key)
  local fields = look_at(key, 'state', 'needs', 'recall', 'recall_data')
  local from, to = string.find(fields.needs or '', '\n' .. ended .. '\n', 1, true)
  if fields.state ~= 'pending' or not from then return end
  local left = string.sub(fields.needs, 1, from) .. string.sub(fields.needs, to + 1)
  if left ~= '\n' then return redis.call('HSET', status_name(key), 'needs', left) end
  redis.call('HDEL', status_name(key), 'needs', 'recall', 'recall_data', 'due_ms')
  redis.call('HSET', status_name(key), 'pushed_ms', int(now_ms))
  pcall(replay, fields.recall, fields.recall_data)
  event('call', key, 'pending')
end

-- Those who hear of the end of a root: its aliases. Who only needs it, or did, is seen to here.
local function led_by(root)
  local led = {}
  for _, key in ipairs(redis.call('SMEMBERS', aliases_name(root))) do
    local fields = look_at(key, 'state', 'alias')
    if fields.alias ~= root then
      satisfy(key, root)
    elseif fields.state == 'pending' then
      led[#led + 1] = key
    end
  end
  return led
end

-- A request, and who led to it, lead to this root from now on: the keys of all of them.
local function lead_to(key, root)
  local led = led_by(key)
  redis.call('DEL', aliases_name(key))
  led[#led + 1] = key
  for _, other in ipairs(led) do
    redis.call('HSET', status_name(other), 'alias', root)
    redis.call('SADD', aliases_name(root), other)
  end
  redis.call('PERSIST', aliases_name(root))
  return led
end

-- The root ended without a result, and so do these, each for as long as its own route says.
local function end_aliases(keys, state, err, negative_until)
  for _, key in ipairs(keys) do
    local status = status_name(key)
    local kept_ms = tonumber(redis.call('HGET', status, 'failure_ttl_ms') or nil) or 0
    redis.call('HSET', status, 'state', state, 'ended_ms', int(now_ms))
    if state == 'failed' then redis.call('HSET', status, 'error', err or '') end
    if negative_until then redis.call('HSET', status, 'negative_until', negative_until) end
    redis.call('HDEL', status, 'failure_ttl_ms')
    redis.call('PEXPIRE', status, int(math.max(kept_ms, (tonumber(negative_until or nil) or 0) - now_ms, 1)))
    redis.call('ZREM', redirected_name(), key)
    list_ended(key, state)
    wake(key, state)
    event('alias', key, state)
  end
end

local function end_all_led_by(root, state, err, negative_until)
  end_aliases(led_by(root), state, err, negative_until)
  redis.call('UNLINK', aliases_name(root))
end

-- An alias leaves its root; the aliases of a root go with its result: how many.
local function drop_aliases(key)
  local root, dropped = look_at(key, 'alias').alias, 0
  if root then redis.call('SREM', aliases_name(root), key) end
  for _, alias in ipairs(redis.call('SMEMBERS', aliases_name(key))) do
    local fields = look_at(alias, 'state', 'alias')
    if fields.state == 'completed' and fields.alias == key then
      erase(alias)
      redis.call('ZREM', results_name(), alias)
      redis.call('ZREM', sizes_name(), alias)
      redis.call('SREM', aliases_name(key), alias)
      wake(alias, 'unknown')
      event('forget', alias, 'unknown')
      dropped = dropped + 1
    end
  end
  return dropped
end

-- The record of an alias lives as long as the root's result.
local function expire_alias(key, deadline_ms)
  redis.call('HSET', status_name(key), 'sticky', deadline_ms and '0' or '1')
  expire_at(status_name(key), deadline_ms)
  redis.call('ZADD', results_name(), deadline_ms and int(deadline_ms) or '+inf', key)
  redis.call('ZADD', sizes_name(), 0, key)
end

-- The root has its result, and these answer with it.
local function complete_aliases(keys, root, deadline_ms)
  for _, key in ipairs(keys) do
    local status = status_name(key)
    redis.call('HSET', status, 'state', 'completed', 'ended_ms', int(now_ms))
    redis.call('HDEL', status, 'redirect', 'failure_ttl_ms', 'hops', 'error', 'kwargs', 'ticket', 'slot', 'ttl_ms',
      'fallback_ttl_ms', 'pushed_ms', 'due_ms', 'lease_ms', 'popped')
    redis.call('ZREM', redirected_name(), key)
    expire_alias(key, deadline_ms)
    wake(key, 'completed')
    event('alias', key, 'completed')
  end
  if #keys > 0 then expire_at(aliases_name(root), deadline_ms) end
end

-- An alias gives its payloads to who computes.
local function move_payloads(key, root)
  local payloads = redis.call('HGETALL', callbacks_name(key))
  for i = 1, #payloads, 2 do redis.call('HSETNX', callbacks_name(root), payloads[i], payloads[i + 1]) end
  redis.call('UNLINK', callbacks_name(key))
end
