-- submit: answer a request from the cache, join it to the claim in flight, or claim it and queue it for RQ.
--
-- No allow-oom here: when memory is out a new claim is refused at its first write, with nothing written; a hit and a
-- plain join write nothing that matters and are still answered.
--
-- KEYS status           hash   state, uri, job_id, ...
-- ARGV prefix           str    of every key of ours
-- ARGV key              str    the request's key
-- ARGV uri              str    identity: what the key is the hash of
-- ARGV request          bytes  packed beside the identity
-- ARGV job_id           str    made by the caller; sending the same one again answers the same
-- ARGV commands         str    RQ's own commands that queue this job
-- ARGV data             bytes  what is not text in them
-- ARGV job_prefix       str    of RQ's job hashes
-- ARGV queue            str    logical queue
-- ARGV priority         int    0 high, 1 default, 2 low
-- ARGV sticky           0|1    keep the result without TTL
-- ARGV ttl_ms           int    0 = the request does not say
-- ARGV fallback_ttl_ms  int    the manager's TTL, when neither request nor route says
-- ARGV est_ms           int    0 = the request does not say: learned
-- ARGV family           str    under which run times are learned
-- ARGV payload_id       str    '' = no payload
-- ARGV payload          bytes  kept for the callback
-- ARGV max_pending      int    0 = no limit
-- ARGV max_attempts     int    crashes after which a request is set aside
-- ARGV again            0|1    run again whatever is cached
-- ARGV tags             str    a line each, with a line break before the first; '' = none
-- ARGV more             bytes  further payload ids and payloads in turn, to the end; the last of an odd number is the trace
--   context of a new claim
--
-- Returns {'new', record, fresh} | {'joined', record} | {'hit', record, result} | {'negative', record}
-- Returns {'refused', record, pending} | {'conflict', uri} | {'corrupt', state}
-- Returns also: result is owner, envelope and bytes; fresh is submitted_ms and est_ms of a claim made now, whose record
-- the caller knows: it is ''.

local status = KEYS[1]
local key, uri, request = ARGV[2], ARGV[3], ARGV[4]
local job_id, commands, data, job_prefix = ARGV[5], ARGV[6], ARGV[7], ARGV[8]
local queue, priority = ARGV[9], tonumber(ARGV[10])
local sticky, ttl_ms, fallback_ttl_ms = ARGV[11], tonumber(ARGV[12]), tonumber(ARGV[13])
local est_ms, family = tonumber(ARGV[14]), ARGV[15]
local payload_id, payload = ARGV[16], ARGV[17]
local max_pending, max_attempts = tonumber(ARGV[18]), tonumber(ARGV[19])
local again, tags = ARGV[20], ARGV[21]

-- Everything that is asked about the record, in one look: first what the caller gets. Written out: loops cost more.
local values, n = redis.call('HMGET', status, record_fields(), 'job_id', 'ttl_ms', 'fallback_ttl_ms', 'ticket', 'slot',
  'lease_until', 'crashes', 'negative_until', 'moved_by', 'limit'), #RECORD_FIELDS
local claim = {record_values(values), job_id = values[n + 1], ttl_ms = values[n + 2], fallback_ttl_ms = values[n + 3],
  ticket = values[n + 4], slot = values[n + 5], lease_until = values[n + 6], crashes = values[n + 7],
  negative_until = values[n + 8], moved_by = values[n + 9], limit = values[n + 10]}
local state, known_uri = claim.state, uri_of(claim)

-- Whether somebody will run, or runs, what is in flight. Of an alias its root decides.
local is_live, root = false, state == 'pending' and claim.alias
local flown = claim
if root then
  flown = redis.call('HMGET', status_name(root), 'state', 'job_id', 'lease_until', 'alias')
  flown = {state = not flown[4] and flown[1], job_id = flown[2], lease_until = flown[3]}
end
if flown.state == 'pending' then
  -- RQ's states in which a job will still be delivered.
  local DELIVERED = {queued = true, scheduled = true, deferred = true, started = true}
  is_live = DELIVERED[redis.call('HGET', job_prefix .. flown.job_id, 'status') or '']
elseif flown.state == 'in_progress' then
  is_live = tonumber(flown.lease_until) > now_ms
end

-- A plain hit and a plain join, which most submits are, are answered before the rest is even defined: a script makes its
-- functions anew at every run, and these cost more than the answer.
local adds_nothing = known_uri == uri and payload_id == '' and tonumber(sticky) <= tonumber(claim.sticky or 0)
local stored
if adds_nothing and state == 'completed' and again == '0' and ttl_ms == 0 then
  stored = stored_result(key, claim.alias)
  adds_nothing = stored[1]
elseif adds_nothing and is_live and claim.job_id ~= job_id then
  adds_nothing = ttl_ms <= tonumber(claim.ttl_ms) and fallback_ttl_ms <= tonumber(claim.fallback_ttl_ms)
    and priority >= tonumber(claim.priority)
else
  adds_nothing = false
end
local plain = adds_nothing and {stored and 'hit' or 'joined', packed_record(values), stored}
if plain and not note_submission(plain[1], key, family, claim) then return plain end

-- PRELUDE

if plain then
  settle('submissions')
  return plain
end

local more = {unpack(ARGV, 22)}

local function keep_payload()
  if payload_id ~= '' then
    -- An alias computes nothing: its root does.
    local computing = root and is_live and root or key
    redis.call('HSETNX', callbacks_name(computing), payload_id, payload)
    for i = 1, #more - 1, 2 do redis.call('HSETNX', callbacks_name(computing), more[i], more[i + 1]) end
    redis.call('PERSIST', callbacks_name(computing))
  end
end

local function claim_it()
  -- First of all writes, because the server refuses it when memory is out. Behind a DEL it would let everything pass.
  local ticket = next_seq()
  if state then
    -- RARE
    -- A result that was evicted or deleted still stands in the indexes; a sticky one would for ever.
    if state == 'completed' or redis.call('EXISTS', result_name(key)) == 1 then
      drop_result(key, redis.call('EXISTS', result_name(key)) == 0 and 'lost' or 'replaced')
    end
    redis.call('DEL', status, emitted_name(key))
    redis.call('PERSIST', callbacks_name(key))
    readmit(key)
    -- /RARE
  end
  if est_ms == 0 then
    local learned = redis.call('HMGET', stats_name('runtime'), family, '*')
    est_ms = tonumber(learned[1] or nil) or tonumber(learned[2] or nil) or 0
  end
  keep_payload()
  enter(key, uri, request, job_id, commands, data, queue, priority, ticket, est_ms, sticky, ttl_ms, fallback_ttl_ms)
  if tags ~= '' then
    -- RARE
    index_tags(key, tags)
    -- /RARE
  end
  if #more % 2 == 1 then redis.call('HSET', status, 'trace', more[#more]) end
end

-- Whose result answers.
local holder = claim.alias or key
local outcome, extra
if state and known_uri ~= uri then
  outcome, extra = 'conflict', known_uri
elseif state == 'completed' and (again == '0' or claim.job_id == job_id)
  and redis.call('EXISTS', result_name(holder)) == 1 then
  -- RARE
  lengthen(holder, sticky == '1', ttl_ms)
  outcome, extra = 'hit', stored_result(key, claim.alias)
  -- /RARE
elseif state and claim.job_id == job_id then
  -- The same call, sent again because its reply was lost. Also when the request has ended since: it must not run
  -- twice for that, and RQ must not see one job id twice.
  outcome = claim.moved_by == job_id and 'joined' or 'new'
elseif state == 'pending' or state == 'in_progress' then
  -- RARE
  -- What a joiner of an alias wishes goes to the root too.
  local function merge()
    raise_wishes(key, claim, tonumber(sticky), ttl_ms, fallback_ttl_ms)
    if root and is_live then
      raise_wishes(root, record(root, 'sticky', 'ttl_ms', 'fallback_ttl_ms'), tonumber(sticky), ttl_ms, fallback_ttl_ms)
    end
    keep_payload()
  end

  -- My ticket replaces the claim's, which will find itself superseded. The record says where mine stands. A better
  -- priority or another queue means the end of that line, for the line as for RQ's list: else position and eta lie.
  local function replace_ticket()
    local better = math.min(priority, tonumber(claim.priority))
    if better < tonumber(claim.priority) or queue ~= claim.queue then
      leave_line(key, claim)
      claim.queue, claim.priority, claim.ticket, claim.slot = queue, better, next_seq(), nil
      redis.call('HSET', status, 'queue', queue, 'priority', int(better), 'ticket', int(claim.ticket))
    end
    requeue(key, claim, job_id, commands, data)
    -- Mine is in the queue now, whatever the old one waited for: were it lost, the sweep would wait that long to look.
    redis.call('HDEL', status, 'due_ms')
  end

  local strikes = tonumber(claim.crashes) or 0
  if state == 'pending' and not is_live then
    if root then break_away(key, root) end
    merge()
    replace_ticket()
    count('executions', 'revived')
    event('revive', key, 'pending')
    outcome = 'new'
  elseif state == 'in_progress' and not is_live and strikes + 1 >= max_attempts then
    redis.call('HINCRBY', status, 'crashes', 1)
    note_attempt(key, claim, 'crashed', '')
    keep_payload()
    set_aside(key, claim, '', 'poison')
    count('executions', 'crashed')
    event('crash', key, 'failed')
    outcome = 'negative'
  elseif state == 'in_progress' and not is_live then
    redis.call('HINCRBY', status, 'crashes', 1)
    note_attempt(key, claim, 'crashed', '')
    merge()
    replace_ticket()
    count('executions', 'crashed')
    event('crash', key, 'pending')
    outcome = 'new'
  else
    merge()
    if state == 'pending' and not root and priority < tonumber(claim.priority) then
      replace_ticket()
      redis.call('HSET', status, 'moved_by', job_id)
    end
    outcome = 'joined'
  end
  -- /RARE
elseif again == '0' and state == 'failed'
  and (BLOCKING[claim.quarantined or ''] or tonumber(claim.negative_until or 0) > now_ms) then
  outcome = 'negative'
elseif state and state ~= 'completed' and state ~= 'failed' and state ~= 'cancelled' then
  outcome, extra = 'corrupt', state
elseif max_pending > 0 and redis.call('ZCARD', pending_name(queue)) >= max_pending then
  outcome, extra = 'refused', redis.call('ZCARD', pending_name(queue))
else
  claim_it()
  count_submission('new', key, family, claim)
  return {'new', '', {int(now_ms), int(est_ms)}}
end

count_submission(outcome, key, family, claim)
if outcome == 'conflict' or outcome == 'corrupt' then return {outcome, extra} end
return {outcome, answer_fields(key), extra}
