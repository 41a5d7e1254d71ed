-- Statistics: notes of what happened, and how they are added up.

-- Statistics never stand in the way: a hit is answered also when memory is out, and what somebody else wrote into them stops
-- nothing. A transition only notes what happened, by one RPUSH; whoever makes it MOST_NOTED notes adds them up, and who
-- reads adds the rest. True: it is time to `settle`. A note of a submit: minute, outcome, family, ms that were saved, the
-- key that was hit. A hit saves the run that made the result, a join the one that it waits for.
local MOST_NOTED = 100
local function note_submission(outcome, key, family, fields)
  local saved_ms, hit = 0, ''
  if outcome == 'hit' then
    saved_ms, hit = (tonumber(fields.ended_ms) or 0) - (tonumber(fields.started_ms) or math.huge), key
  elseif outcome == 'joined' then
    saved_ms = tonumber(fields.est_ms) or 0
  end
  local noted = redis.pcall('RPUSH', noted_name('submissions'), int(now_ms / 60000) .. '\n' .. outcome .. '\n'
    .. string.sub(family, 1, 61) .. '\n' .. int(math.max(saved_ms, 0)) .. '\n' .. hit)
  return type(noted) == 'number' and noted >= MOST_NOTED
end

-- A part of a URI is a label only when it looks like a name: neither a key nor a number of somebody's.
local function route_of(family)
  if #family > 60 or string.find(family, '%x%x%x%x%x%x%x%x') or string.find(family, '%d%d%d%d%d') then return '*' end
  return family
end

-- Upper bounds of the histograms, of which a field is named: '+' has no bound.
local TIMES_MS = {5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000, 1800000, 3600000}
local SIZES = {256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864, 268435456, 1073741824}
local function within(bounds, value)
  for i = 1, #bounds do
    if value <= bounds[i] then return bounds[i] end
  end
  return '+'
end

-- `h<cell>`: the key that the cell votes for. Half of the votes go with each hour; another key takes them off, and the
-- cell when it is empty: so keys that are asked for often stay, in 256 cells, whatever the number of keys.
local HOUR_MS = 3600000
local function votes_in(cell)
  local votes, since, key = string.match(cell or '', '^(%d+) (%d+) (.+)$')
  if not votes then return 0 end
  return math.floor(votes * 0.5 ^ math.max(math.floor(now_ms / HOUR_MS) - since, 0)), key
end

-- The notes of a family, added to its counters in `known`; answers those that changed. Fields: `word` in all;
-- `m<slot>:word` in the minute that its value names first, on a ring; `r:word:route`, as many as `:routes:word` says, then
-- `r:word:*`; the others stand in docs/keys.md. What many notes have in common is looked at once. `fetch` reads many fields.
local MINUTES_KEPT, MOST_LABELS = 64, 100
local function add_up(family, noted, known, fetch)
  local times, groups, hits, changed = {}, {}, {}, {}
  local function observe(seen, bounds, value, n)
    local bound = within(bounds, value)
    seen[bound], seen.sum = (seen[bound] or 0) + n, (seen.sum or 0) + value * n
  end
  local function group_of(about, n)
    local group = groups[about] or {n = 0, saved_ms = 0, run = {}, wait = {}, size = {}}
    groups[about], group.n = group, group.n + n
    return group
  end
  local function see_submission(note, n)
    local about, saved_ms, hit = string.match(note, '^(.*)\n(%S*)\n(%S*)$')
    if not about then return end
    local group = group_of(about, n)
    if saved_ms ~= '0' then group.saved_ms = group.saved_ms + (tonumber(saved_ms) or 0) * n end
    if hit ~= '' then hits[hit] = (hits[hit] or 0) + n end
  end
  local function see_end(note, n)
    local about, run_ms, wait_ms, size = string.match(note, '^(.*)\n(%d*)\n(%d*)\n(%d*)$')
    if not about then return end
    local group = group_of(about, n)
    if run_ms ~= '' then observe(group.run, TIMES_MS, tonumber(run_ms), n) end
    if wait_ms ~= '' then observe(group.wait, TIMES_MS, tonumber(wait_ms), n) end
    if size ~= '' then observe(group.size, SIZES, tonumber(size), n) end
  end
  for _, note in ipairs(noted) do times[note] = (times[note] or 0) + 1 end
  for note, n in pairs(times) do (family == 'submissions' and see_submission or see_end)(note, n) end
  local function set(name, value) known[name], changed[name] = value, value end
  local function add(name, n) set(name, int((tonumber(known[name] or nil) or 0) + n)) end
  local function add_minute(minute, word, n)
    local slot, ago = 'm' .. minute % MINUTES_KEPT .. ':' .. word, math.floor(now_ms / 60000) - minute
    -- What is older than the ring, or ahead of the clock, stands in the sum only.
    if ago < 0 or ago >= MINUTES_KEPT then return end
    local then_minute, before = string.match(known[slot] or '', '^(%d+) (%d+)$')
    set(slot, minute .. ' ' .. int((then_minute == minute and before or 0) + n))
  end
  local function add_route(word, route, n)
    local field, rest = 'r:' .. word .. ':' .. route, 'r:' .. word .. ':*'
    if field ~= rest and not known[field] then
      if (tonumber(known[':routes:' .. word] or nil) or 0) >= MOST_LABELS then return add(rest, n) end
      add(':routes:' .. word, 1)
    end
    add(field, n)
  end
  local function add_vote(key, cell, n)
    local votes, held_by = votes_in(known[cell])
    votes = held_by == key and votes + n or votes - n
    if votes < 0 then votes, held_by = -votes, key end
    set(cell, votes .. ' ' .. math.floor(now_ms / HOUR_MS) .. ' ' .. held_by)
  end
  for about, group in pairs(groups) do
    local minute, word, name, queue = string.match(about, '^(%d+)\n(%l+)\n([^\n]*)\n?(.*)$')
    if minute then
      add(word, group.n)
      add_minute(minute, word, group.n)
      if family == 'submissions' or group.size.sum then add_route(word, route_of(name), group.n) end
      if group.saved_ms > 0 then add('saved:' .. word, group.saved_ms) end
      if group.run.sum then add('q:' .. word .. ':' .. queue, group.n) end
      for bound, n in pairs(group.run) do add('run:' .. bound .. ':' .. queue, n) end
      for bound, n in pairs(group.wait) do add('wait:' .. bound .. ':' .. queue, n) end
      for bound, n in pairs(group.size) do add('size:' .. bound .. ':', n) end
    end
  end
  local keys, cells = {}, {}
  for key in pairs(hits) do
    keys[#keys + 1], cells[#cells + 1] = key, 'h' .. (tonumber(string.sub(key, -2), 16) or #key)
  end
  if fetch then fetch(known, cells) end
  for i, key in ipairs(keys) do add_vote(key, cells[i], hits[key]) end
  return changed
end

-- The servers keep a small hash as a list and search it from its start for each field, which costs more than all else here.
-- One value above 64 bytes makes it a table.
local AS_TABLE = 'longer than hash-max-listpack-value, so that the server finds a field at once'

-- What somebody else noted must not stop a transition in the middle, nor make it long.
local function settle(family)
  local function read(known, field)
    local value = redis.pcall('HGET', stats_name(family), field)
    known[field] = type(value) == 'string' and value
    return known[field]
  end
  local function fetch(known, names)
    for i, value in ipairs(names[1] and redis.call('HMGET', stats_name(family), unpack(names)) or {}) do
      known[names[i]] = value
    end
  end
  local noted = redis.pcall('LPOP', noted_name(family), MOST_NOTED)
  local found, changed = pcall(add_up, family, noted, setmetatable({}, {__index = read}), fetch)
  if not found then return end
  local flat = {':', AS_TABLE}
  for field, value in pairs(changed) do flat[#flat + 1], flat[#flat + 2] = field, value end
  redis.pcall('HSET', stats_name(family), unpack(flat))
end

-- The counters of a family as they are now, for who only reads: a flat list.
local function counted(family)
  local known, flat = {}, redis.pcall('HGETALL', stats_name(family))
  for field, value in pairs_of(flat) do known[field] = value end
  pcall(add_up, family, redis.pcall('LRANGE', noted_name(family), 0, -1), known)
  flat = {}
  for field, value in pairs(known) do flat[#flat + 1], flat[#flat + 2] = field, value end
  return flat
end

local function count_submission(outcome, key, family, fields)
  if note_submission(outcome, key, family, fields) then
    -- RARE
    settle('submissions')
    -- /RARE
  end
end

-- A note of an attempt that ended: minute, word; if for good: family, queue, ms that it ran and had waited, stored size.
local function note_end(word, family, queue, run_ms, wait_ms, size_bytes)
  local noted = redis.pcall('RPUSH', noted_name('executions'), int(now_ms / 60000) .. '\n' .. word .. '\n'
    .. string.sub(family, 1, 61) .. '\n' .. queue .. '\n' .. run_ms .. '\n' .. wait_ms .. '\n' .. size_bytes)
  if type(noted) == 'number' and noted >= MOST_NOTED then
    -- RARE
    settle('executions')
    -- /RARE
  end
end

local function count(family, word)
  if family == 'executions' then note_end(word, '', '', '', '', '') else redis.pcall('HINCRBY', stats_name(family), word, 1) end
end

-- An attempt that ended for good. `size_bytes` and `family` are known of a result only.
local function count_end(word, fields, family, size_bytes)
  local started_ms = tonumber(fields.started_ms) or now_ms
  local waited_ms = started_ms - (tonumber(fields.pushed_ms) or started_ms)
  note_end(word, family or '', fields.queue or '', int(math.max(now_ms - started_ms, 0)), int(math.max(waited_ms, 0)),
    size_bytes or '')
end

-- An attempt speaks that holds its request no more. `duplicate`: another one runs it now, or has ended it, so the work
-- was done twice. `late`: the request was cancelled, put, handed back or given a new ticket meanwhile.
local function count_refusal(fields, token)
  local is_duplicate = fields.state == 'in_progress'
    or (tonumber(string.match(fields.done_token or '', '^%d+$')) or 0) > (tonumber(token) or math.huge)
  count('refusals', is_duplicate and 'duplicate' or 'late')
end
