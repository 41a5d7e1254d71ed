-- What only views and invalidations look for: tags, routes, the place of a cursor.

-- Tags stand in the record with a line break before and behind each.
local function has_tag(tags, tag)
  return tags and string.find(tags, '\n' .. tag .. '\n', 1, true) ~= nil
end

-- The index of each tag, paid by requests with tags only. Nothing tells it that a record has expired, so each request that
-- comes looks at the two that nobody has looked at for longest: the indexes never hold many more than are alive.
local function index_tags(key, tags)
  for _, entry in ipairs(redis.call('ZRANGE', tagged_name(), 0, 1)) do
    local old, old_tags = string.match(entry, '^([^\n]*)(.*)$')
    local its_tags = look_at(old, 'tags').tags
    if its_tags == old_tags then
      redis.call('ZADD', tagged_name(), int(now_us), entry)
    else
      redis.call('ZREM', tagged_name(), entry)
      for tag in string.gmatch(old_tags, '[^\n]+') do
        if not has_tag(its_tags, tag) then redis.call('ZREM', tag_name(tag), old) end
      end
    end
  end
  redis.call('HSET', status_name(key), 'tags', tags)
  redis.call('ZADD', tagged_name(), int(now_us), key .. tags)
  for tag in string.gmatch(tags, '[^\n]+') do redis.call('ZADD', tag_name(tag), int(now_us), key) end
end

-- Whether an identity (version, operation, URI) belongs to a route: its operation, or the beginning of its path, with or
-- without the host. The pattern ends in a place: what stands there must begin something new.
local function is_on_route(identity, route, pattern)
  local operation, uri = string.match(identity, '^[^\n]*\n([^\n]*)\n(.*)$')
  if not operation then return false end
  if operation ~= '' then return operation == route end
  uri = string.gsub(uri, '^%a[%w+.-]*://', '')
  uri = string.gsub(uri, '^[^/?#@]*@', '')
  local stop = string.match(uri, pattern)
  return stop and (stop == #uri + 1 or string.find(uri, '^[/?#:]', stop) ~= nil) or false
end

-- The rank behind the last entry that a walk has seen. When that has moved or gone: of its score, so that nothing is left
-- out.
local function rank_behind(index, score, member, from_end)
  if redis.call('ZSCORE', index, member) == score then
    return redis.call(from_end and 'ZREVRANK' or 'ZRANK', index, member) + 1
  end
  if from_end then return redis.call('ZCOUNT', index, '(' .. score, '+inf') end
  return redis.call('ZCOUNT', index, '-inf', '(' .. score)
end
