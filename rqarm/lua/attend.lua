-- attend: see to a failure of which nobody could be told at once, because who found the death did not know the routes.
--
-- FLAGS allow-oom
-- KEYS status      hash   state, error, ...
-- ARGV prefix      str    of every key of ours
-- ARGV key         str    the request's key
-- ARGV since       int    its score among the unattended: which of its failures it is
-- ARGV follow_up   bytes  of who is told: kind, key, identity, request, job id, RQ's commands, data; to the end
--
-- Returns {'attended'} | {'already'}
-- Returns also: already also when the request has left the quarantine since.

local key, since = ARGV[2], tonumber(ARGV[3])
local status = KEYS[1]
local follow_up = {unpack(ARGV, 4)}

local claim = record(key, 'state', 'queue', 'priority', 'error')

local known = tonumber(redis.call('ZSCORE', unattended_name(follow_up[1]), key) or nil)
if claim.state ~= 'failed' or known ~= since then return {'already'} end

-- A copy of the payloads: when the request is run again, they are for its end.
follow(key, follow_up, claim, true, {'error', claim.error or ''})
return {'attended'}
