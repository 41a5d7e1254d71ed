-- attend: see to a failure of which nobody could be told at once, because who found the death did not know the routes.
--
-- FLAGS allow-oom
-- KEYS status      hash   state, error, ...
-- ARGV prefix      str    of every key of ours
-- ARGV key         str    the request's key
-- ARGV kind        str    who is told: failure, quarantine
-- ARGV since       int    its score among the unattended: which of its failures it is
-- ARGV follow_ups  bytes  of who is told: key, identity, request, job id, RQ's commands, data; to the end
--
-- Returns {'attended'} | {'already'}
-- Returns also: already also when the request has left the quarantine since.

local key, kind, since = ARGV[2], ARGV[3], tonumber(ARGV[4])
local status = KEYS[1]
local follow_ups = {unpack(ARGV, 5)}

local claim = record(key, 'state', 'queue', 'priority', 'error')

local known = tonumber(redis.call('ZSCORE', unattended_name(kind), key) or nil)
if claim.state ~= 'failed' or known ~= since then return {'already'} end

redis.call('ZREM', unattended_name(kind), key)
-- A copy of the payloads: when the request is run again, they are for its end.
follow(key, follow_ups, claim, true, {'error', claim.error or ''})
return {'attended'}
