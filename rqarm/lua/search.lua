-- search: a page of the requests that pass a filter, from one or several indexes, in a bounded number of looks.
--
-- An entry counts only in the index where its record belongs now, so nothing is found twice. A page ends after `limit`
-- entries or `most` looks, whichever comes first; its cursor names the last entry that was looked at.
--
-- KEYS queues   set  logical queues that were ever used
-- ARGV prefix   str  of every key of ours
-- ARGV places   str  where to look, in this order: in_progress, pending, completed, failed, cancelled,
--                    quarantined, largest, with_tag, with spaces between; '-' in front of one: from its end
-- ARGV exact    str  keys that are looked at before all others, with spaces between
-- ARGV state    str  '' = any; quarantined is one
-- ARGV queue    str  '' = any
-- ARGV tag      str  '' = any
-- ARGV route    str  an operation, or what pattern was made of; '' = any
-- ARGV pattern  str  Lua pattern of the route
-- ARGV texts    str  JSON list, lower case: one of them is in the URI, or the key begins with it; [] = any
-- ARGV cursor   str  what the page before answered; '' = from the start
-- ARGV limit    int  entries of a page
-- ARGV most     int  records that are looked at
--
-- Returns {'page', cursor, looked_at, total, key, record, expires_ms, size_bytes, ...}
-- Returns also: cursor is '' at the end; looked_at counts from the first page; total is the size of the indexes.

local queues = KEYS[1]
local places, exact, state, queue, tag = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local route, pattern, texts = ARGV[7], ARGV[8], ARGV[9]
local cursor, limit, most = ARGV[10], tonumber(ARGV[11]), tonumber(ARGV[12])

-- Entries that are fetched from an index at a time.
local STEP = 100

local INDEXES = {in_progress = leases_name(), completed = results_name(), failed = ended_name('failed'),
  cancelled = ended_name('cancelled'), quarantined = quarantine_name(), largest = sizes_name(), with_tag = tag_name(tag)}
local wanted_texts = cjson.decode(texts)

local function is_wanted_text(key, uri)
  if #wanted_texts == 0 then return true end
  local lower = string.lower(uri)
  for _, text in ipairs(wanted_texts) do
    if string.find(lower, text, 1, true) or string.sub(key, 1, #text) == text then return true end
  end
  return false
end

local function belongs(kind, its_state, is_aside)
  if kind == 'with_tag' then return true end
  if kind == 'quarantined' then return is_aside end
  if kind == 'failed' and is_aside then return false end
  return its_state == (kind == 'largest' and 'completed' or kind)
end

-- Whether the record of the key passes; kind: of the index in which it was found.
local function passes(key, kind, is_exact)
  local v = redis.pcall('HMGET', status_name(key), 'state', 'quarantined', 'queue', 'tags', 'uri', 'uri_2', 'uri_3')
  if v.err or not v[1] then return false end
  local is_aside = v[1] == 'failed' and v[2] ~= false
  if kind and not belongs(kind, v[1], is_aside) then return false end
  if state == 'quarantined' and not is_aside then return false end
  if state ~= '' and state ~= 'quarantined' and v[1] ~= state then return false end
  if queue ~= '' and v[3] ~= queue then return false end
  if tag ~= '' and not has_tag(v[4], tag) then return false end
  local identity = (v[5] or '') .. (v[6] or '') .. (v[7] or '')
  if route ~= '' and not is_on_route(identity, route, pattern) then return false end
  return is_exact or is_wanted_text(key, string.match(identity, '^[^\n]*\n[^\n]*\n(.*)$') or identity)
end

local walk, total = {}, 0
local function add(label, kind, index, from_end)
  walk[#walk + 1] = {label = label, kind = kind, index = index, from_end = from_end}
  total = total + redis.call('ZCARD', index)
end
for word in string.gmatch(places, '%S+') do
  local from_end, kind = string.match(word, '^(-?)(.*)$')
  if kind == 'pending' then
    local names = queue ~= '' and {queue} or redis.call('SMEMBERS', queues)
    table.sort(names)
    for _, name in ipairs(names) do add(word .. '@' .. name, kind, pending_name(name), from_end == '-') end
  else
    add(word, kind, INDEXES[kind], from_end == '-')
  end
end

local page = {'page', '', 0, total}
local looked_at, found = 0, 0
local function give(key)
  local n = #page
  page[n + 1], page[n + 2] = key, answer_fields(key)
  page[n + 3], page[n + 4] = redis.call('ZSCORE', results_name(), key), redis.call('ZSCORE', sizes_name(), key)
end

local is_exact = {}
for key in string.gmatch(exact, '%S+') do
  if not is_exact[key] and cursor == '' and passes(key, nil, true) then give(key) end
  is_exact[key] = true
end

local label, score, member, before = string.match(cursor, '^(%S+) (%S+) (%S+) (%d+)$')
local resumed = cursor == ''
local last_label, last_score, last_member = label, score, member
local is_full = false
for _, place in ipairs(walk) do
  local rank
  if resumed then
    rank = 0
  elseif place.label == label then
    rank, resumed = rank_behind(place.index, score, member, place.from_end), true
  end
  while rank and not is_full do
    local rows = redis.call(place.from_end and 'ZREVRANGE' or 'ZRANGE', place.index, rank, rank + STEP - 1,
      'WITHSCORES')
    if #rows == 0 then break end
    for i = 1, #rows, 2 do
      is_full = found >= limit or looked_at >= most
      if is_full then break end
      local key = rows[i]
      looked_at = looked_at + 1
      last_label, last_score, last_member = place.label, rows[i + 1], key
      if not is_exact[key] and passes(key, place.kind, false) then
        give(key)
        found = found + 1
      end
    end
    rank = rank + #rows / 2
  end
  if is_full then break end
end
page[3] = looked_at + (tonumber(before) or 0)
if is_full then page[2] = last_label .. ' ' .. last_score .. ' ' .. last_member .. ' ' .. int(page[3]) end
return page
