-- follow: how far a request is, and what its attempt has emitted since its follower looked last.
--
-- KEYS status  hash  the record
-- ARGV prefix  str   of every key of ours
-- ARGV key     str   the request's key
-- ARGV token   str   of the attempt that the follower knows; '' = none
-- ARGV number  int   of the last that he has of it
--
-- Returns {'found', record, token, first, values, result} | {'unknown'}
-- Returns also: token is that of the attempt that runs or was the last, '' = not known; first is the number of the first of
-- the values; result is owner, envelope and bytes, empty until the request is completed.

local status = KEYS[1]
local key, token, number = ARGV[2], ARGV[3], tonumber(ARGV[4])

local claim = record(key, 'state', 'token', 'emitted', 'done_token', 'alias')

if not claim.state then return {'unknown'} end
local current = claim.token or claim.emitted
if not current and claim.state ~= 'pending' then current = claim.done_token end
local first, count = kept_emissions(key, claim.emitted)
local from = current == token and math.max(first, number + 1) or first
local values = count > 0 and redis.call('LRANGE', emitted_name(key), 1 + from - first, -1) or {}
return {'found', answer_fields(key), current or '', int(from), values,
  claim.state == 'completed' and stored_result(key, claim.alias) or {}}
