-- What every transition uses: time, numbers, records, events.
--
-- The prelude is what the transitions share. A script gets the paragraphs that it needs, in the order of the files in
-- scripts.PRELUDE; key names are written out by rqarm.keys.
--
-- Order of work in every script: read, refuse, write, one return. Numbers go out by `int`: a Lua number printed by
-- tostring loses digits above 1e14, and our times in microseconds are above.

-- Without its fraction. '%.0f' and `..` take three times as long, and a script does it a dozen times.
local function int(n) return string.format('%d', math.floor(n)) end

local clock = redis.call('TIME')
local now_us = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local now_ms = math.floor(now_us / 1000)

-- Rises for ever: outlives records, FLUSHDB (the time is higher than any token before it) and clock steps.
local function next_seq()
  local seq = math.max(tonumber(redis.call('GET', seq_name()) or 0) + 1, now_us)
  redis.call('SET', seq_name(), int(seq))
  return seq
end

local function record(key, ...)
  local values = redis.call('HMGET', status_name(key), ...)
  local fields = {}
  for i, name in ipairs({...}) do fields[name] = values[i] end
  return fields
end

-- What somebody else wrote under one of our names must not stop the healing of all others: a record that cannot be read
-- counts as gone.
local function look_at(key, ...)
  local values, fields = redis.pcall('HMGET', status_name(key), ...), {}
  if values.err then return fields end
  for i, name in ipairs({...}) do fields[name] = values[i] end
  return fields
end

-- The identity lies in pieces of 64 bytes; the third takes what is left. One value that is longer, and the server stores
-- the whole record in another way, which takes three times as much. An earlier form is one piece of any length.
local function uri_fields(uri)
  local fields = {'uri', string.sub(uri, 1, 64)}
  if #uri > 64 then fields[3], fields[4] = 'uri_2', string.sub(uri, 65, 128) end
  if #uri > 128 then fields[5], fields[6] = 'uri_3', string.sub(uri, 129) end
  return unpack(fields)
end

local function uri_of(fields)
  return (fields.uri or '') .. (fields.uri_2 or '') .. (fields.uri_3 or '')
end

-- The record for the caller, as one string: netstrings of RECORD_FIELDS in their order, '-' for a field that is not
-- there. One string, because a client reads it several times faster than a list of fourteen.
local function packed_record(values)
  for i = 1, #RECORD_FIELDS do values[i] = values[i] and string.format('%d:', #values[i]) .. values[i] or '-' end
  return table.concat(values, '', 1, #RECORD_FIELDS)
end

local function answer_fields(key)
  return packed_record(redis.call('HMGET', status_name(key), unpack(RECORD_FIELDS)))
end

-- The pairs of a flat list.
local function pairs_of(flat)
  local i = -1
  return function()
    i = i + 2
    return flat[i], flat[i + 1]
  end
end

local EVENTS_KEPT = 10000

local function event(verb, key, state)
  redis.pcall('XADD', events_name(), 'MAXLEN', '~', EVENTS_KEPT, '*', 'verb', verb, 'key', key, 'state', state)
end

-- The message is the state. A small result goes with it, and spares those who wait the look at the record: `state:length of
-- the envelope:envelope bytes`. Bounded, because each of them gets it.
local MOST_TOLD = 1024
local function wake(key, state, envelope, bytes)
  if envelope and #envelope + #bytes <= MOST_TOLD then state = state .. ':' .. #envelope .. ':' .. envelope .. bytes end
  redis.call('PUBLISH', done_name(key), state)
end

-- Replays RQ's recorded commands: a JSON list of commands, each a list of strings. What is not text stands in `data`
-- and goes to the place that the list names at its end: number of the command, number of the argument.
local function replay(commands, data)
  local list = cjson.decode(commands)
  local place = table.remove(list)
  list[place[1]][place[2]] = data
  for _, command in ipairs(list) do redis.call(unpack(command)) end
end

local function expire_at(name, deadline_ms)
  if deadline_ms then redis.call('PEXPIREAT', name, int(deadline_ms)) else redis.call('PERSIST', name) end
end

-- A record goes, with all that lies beside it but a result; and RQ's job, when one is given.
local function erase(key, job)
  redis.call('UNLINK', status_name(key), callbacks_name(key), followup_name(key), emitted_name(key),
    unpack(job and job ~= '' and {job} or {}))
end
