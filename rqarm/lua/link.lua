-- link: leave the trace context of who has submitted, for the execution to link to; or learn that of the execution.
--
-- Sent behind a submit, in the same round trip, by programs that trace. Nothing that correctness needs depends on it, so
-- what it keeps has a TTL and a limit.
--
-- KEYS status   hash   state, trace, traced, ...
-- ARGV prefix   str    of every key of ours
-- ARGV key      str    the request's key
-- ARGV context  str    traceparent of the span of the submit
--
-- Returns {'left'} | {'full'} | {'own'} | {'linked', context} | {'unknown'}
-- Returns also: own is the context with which the claim in flight was made; linked has that of the attempt that ended the
-- request, or is about to; unknown: no execution that traced is known.

local status = KEYS[1]
local key, context = ARGV[2], ARGV[3]

-- The most contexts that a claim keeps: a span of the SDK has 128 links by default.
local MOST_TRACES = 100
local TRACES_KEPT_MS = 24 * 60 * 60 * 1000

local claim = record(key, 'state', 'trace', 'traced', 'attempts', 'submitted_ms', 'alias')
local attempt, execution = string.match(claim.traced or '', '^(%d+):(.+)$')
-- That of an earlier attempt is not the one that counts.
local is_told = attempt and attempt == claim.attempts

-- An alias that waits for its root has had its execution.
local has_run = claim.state ~= 'pending' or claim.alias
if has_run and is_told then return {'linked', execution} end
if claim.state ~= 'pending' and claim.state ~= 'in_progress' then return {'unknown'} end
if claim.trace and string.sub(claim.trace, 1, #context) == context then return {'own'} end

-- The claim's time stands before each, so one that is left over counts for nothing in the next claim.
local traces, entry = traces_name(key), claim.submitted_ms .. ' ' .. context
if redis.call('SISMEMBER', traces, entry) == 1 then return {'left'} end
if redis.call('SCARD', traces) >= MOST_TRACES then return {'full'} end
redis.call('SADD', traces, entry)
redis.call('PEXPIRE', traces, TRACES_KEPT_MS)
return {'left'}
