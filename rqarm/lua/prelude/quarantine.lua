-- What is set aside.

-- Out of the quarantine and of the lists of what has ended, whatever the reason. Who has not been told by now will not be.
local function readmit(key)
  redis.call('ZREM', quarantine_name(), key)
  redis.pcall('ZREM', ended_name('failed'), key)
  redis.pcall('ZREM', ended_name('cancelled'), key)
  redis.call('ZREM', unattended_name('failure'), key)
  redis.call('ZREM', unattended_name('quarantine'), key)
end

-- The ticket of a failed request was put back: it starts anew.
local function revoke_failure(key, fields)
  redis.call('HDEL', status_name(key), 'error', 'quarantined', 'note', 'negative_until', 'crashes', 'retries', 'alias',
    'redirect', 'failure_ttl_ms')
  withdraw_emissions(key)
  readmit(key)
  fields.crashes, fields.retries = nil, nil
end

-- Why a request is set aside. After these nothing runs it but somebody's decision; after the others a submit may. '1' is
-- what an earlier form wrote for poison.
local BLOCKING = {['1'] = true, poison = true, asked = true}

local function set_aside(key, fields, err, reason, note, negative_until)
  land(key, fields)
  redis.call('HSET', status_name(key), 'state', 'failed', 'quarantined', reason, 'ended_ms', int(now_ms), 'error', err)
  if note and note ~= '' then redis.call('HSET', status_name(key), 'note', note) end
  redis.call('ZADD', quarantine_name(), int(now_ms), key)
  -- Whoever sees the death need not know the routes: a worker that does tells those who want to hear of it.
  local since = int(next_seq())
  redis.call('ZADD', unattended_name('failure'), since, key)
  redis.call('ZADD', unattended_name('quarantine'), since, key)
  wake(key, 'failed')
  end_all_led_by(key, 'failed', err, negative_until)
end

-- Too many are set aside: the oldest go, those first after which a submit may run the request anyhow. A flood of failures
-- must not let a killer out.
local function trim_quarantine(keep, most)
  local surplus = math.min(redis.call('ZCARD', quarantine_name()) - keep, most)
  if surplus <= 0 then return end
  local free, kept = {}, {}
  for _, key in ipairs(redis.call('ZRANGE', quarantine_name(), 0, 99)) do
    local list = BLOCKING[look_at(key, 'quarantined').quarantined or ''] and kept or free
    list[#list + 1] = key
  end
  for i = 1, surplus do
    local key = free[i] or kept[i - #free]
    if not key then break end
    erase(key)
    readmit(key)
  end
end

-- RQ's own commands that delete a job: a JSON list of commands, each a list of strings.
local function dismiss(commands)
  for _, command in ipairs(cjson.decode(commands)) do redis.call(unpack(command)) end
end
