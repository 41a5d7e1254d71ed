-- inspect: everything that is known of one request, except values that nobody asked for.
--
-- The events of the key are looked for where they must be: behind the times that the record names, and at the end of the
-- stream. So the look is bounded, however much has happened since.
--
-- KEYS status       hash  the record
-- ARGV prefix       str   of every key of ours
-- ARGV key          str   the request's key
-- ARGV job_prefix   str   of RQ's job hashes
-- ARGV window       int   events that are looked at behind each time
-- ARGV payloads     int   payloads that are listed
-- ARGV with_values  0|1   answer with the payloads themselves
--
-- Returns {'found', now_ms, events, record, fields, expires_ms, result, payload_count, payloads, job, limit}
--   | {'unknown', now_ms, events}
-- Returns also: fields is the record as it lies there, flat; result is owner, envelope, stored bytes inline, chunks,
-- missing chunks, expires_ms, or empty; payloads id, size, value, ...; job is status and worker of RQ's job, or empty;
-- limit is name, places, running, called, parked, place in the line of the parked (0 = not parked), or empty.

local status = KEYS[1]
local key, job_prefix, window = ARGV[2], ARGV[3], ARGV[4]
local payloads, with_values = tonumber(ARGV[5]), ARGV[6]

local seen, events = {}, {}
local function note(entries)
  for _, entry in ipairs(entries) do
    for name, value in pairs_of(entry[2]) do
      if name == 'key' and value == key and not seen[entry[1]] then
        seen[entry[1]] = true
        events[#events + 1] = entry
      end
    end
  end
end

local function result_of(stored)
  local owner, envelope = stored[1], stored[2]
  local chunks = tonumber(stored[3]) or 0
  return {owner, envelope, redis.call('HSTRLEN', result_name(key), 'bytes'), chunks, chunks_missing(key, owner, chunks),
    redis.call('PEXPIRETIME', result_name(key))}
end

local function payloads_of()
  local listed = {}
  for id, value in pairs_of(redis.call('HSCAN', callbacks_name(key), '0', 'COUNT', payloads)[2]) do
    local n = #listed
    if n < 3 * payloads then
      listed[n + 1], listed[n + 2], listed[n + 3] = id, #value, with_values == '1' and value or ''
    end
  end
  return listed
end

local function limit_of(name)
  local rank = redis.call('ZRANK', parked_name(name), key)
  return {name, redis.call('HGET', limits_name(), name) or '0', redis.call('ZCARD', running_name(name)),
    redis.call('ZCARD', called_name(name)), redis.call('ZCARD', parked_name(name)), rank and rank + 1 or 0}
end

note(redis.call('XREVRANGE', events_name(), '+', '-', 'COUNT', window))
local fields = redis.call('HGETALL', status)
if #fields == 0 then return {'unknown', int(now_ms), events} end

local its = {}
for name, value in pairs_of(fields) do its[name] = value end
for _, time in ipairs({its.submitted_ms or '', its.pushed_ms or '', its.started_ms or '', its.ended_ms or ''}) do
  if time ~= '' then note(redis.call('XRANGE', events_name(), time, '+', 'COUNT', window)) end
end
local stored = redis.call('HMGET', result_name(key), 'owner', 'envelope', 'chunks')
local job = its.job_id and redis.pcall('HMGET', job_prefix .. its.job_id, 'status', 'worker_name') or {}
return {'found', int(now_ms), events, answer_fields(key), fields, redis.call('PEXPIRETIME', status),
  stored[1] and result_of(stored) or {}, redis.call('HLEN', callbacks_name(key)), payloads_of(),
  not job.err and job[1] and {job[1], job[2] or ''} or {}, its.limit and limit_of(its.limit) or {}}
