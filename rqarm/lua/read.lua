-- read: what is known of one request; with its result when that is wanted.
--
-- KEYS status      hash  the record
-- ARGV prefix      str   of every key of ours
-- ARGV key         str   the request's key
-- ARGV with_value  0|1   answer with the result as well
--
-- Returns {'found', record, result} | {'unknown'}
-- Returns also: result is owner, envelope and bytes; empty when it is not wanted.

local status = KEYS[1]
local key, with_value = ARGV[2], ARGV[3]

if redis.call('EXISTS', status) == 0 then return {'unknown'} end

local stored = with_value == '1' and stored_result(key) or {}
if stored[1] == false then
  local alias = redis.call('HGET', status, 'alias')
  if alias then stored = stored_result(key, alias) end
end
return {'found', answer_fields(key), stored}
