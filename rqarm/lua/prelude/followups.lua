-- Requests about a request that has ended.

-- In steps, because unpack has a limit.
local function copy_hash(from, to)
  local flat = redis.call('HGETALL', from)
  for i = 1, #flat, 4000 do redis.call('HSET', to, unpack(flat, i, math.min(i + 3999, #flat))) end
end

-- Follow-ups: requests about a request that has ended, each given as its kind and six values. The payloads go with them; a
-- copy, where the request may run again. What else they must know is in `about`, field and value. They belong to the trace of
-- the execution that makes them, else to that of the submit.
local function follow(key, follow_ups, fields, is_copy, about)
  for i = 1, #follow_ups - 6, 7 do
    local kind, follow_up, uri, request, job_id, commands, data = unpack(follow_ups, i, i + 6)
    if kind ~= 'callback' then redis.call('ZREM', unattended_name(kind), key) end
    if is_copy or i + 7 < #follow_ups then
      copy_hash(callbacks_name(key), callbacks_name(follow_up))
    elseif redis.call('EXISTS', callbacks_name(key)) == 1 then
      redis.call('RENAME', callbacks_name(key), callbacks_name(follow_up))
      redis.call('PERSIST', callbacks_name(follow_up))
    end
    redis.call('HSET', followup_name(follow_up), 'of', key, unpack(about))
    enter(follow_up, uri, request, job_id, commands, data, fields.queue, tonumber(fields.priority), next_seq(), 0, '0',
      0, 0)
    local context = string.match(fields.traced or '', '^%d+:(.+)$') or fields.trace
    if context then redis.call('HSET', status_name(follow_up), 'trace', context) end
  end
end
