-- browse: a page of one index, with the record of each entry. Entries whose record has expired are left out.
--
-- KEYS index   zset  pending:queue, leases, results or quarantine
-- ARGV prefix  str   of every key of ours
-- ARGV offset  int   0 = first
-- ARGV limit   int   entries of a page
--
-- Returns {'page', total, key, record, ...}

local index = KEYS[1]
local offset, limit = tonumber(ARGV[2]), tonumber(ARGV[3])

local page = {'page', redis.call('ZCARD', index)}
for _, key in ipairs(redis.call('ZRANGE', index, offset, offset + limit - 1)) do
  if redis.call('EXISTS', status_name(key)) == 1 then
    page[#page + 1] = key
    page[#page + 1] = answer_fields(key)
  end
end
return page
