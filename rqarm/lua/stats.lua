-- stats: the counters and the sizes of the indexes, in one look.
--
-- KEYS queues  set   logical queues that were ever used
-- ARGV prefix  str   of every key of ours
--
-- Returns {'stats', submissions, executions, sweeps, bytes, temporary, sticky, in_progress, quarantined, queues}
-- Returns also: submissions, executions, sweeps flat hashes; queues name, waiting, ...

local queues = KEYS[1]

local waiting = {}
for _, queue in ipairs(redis.call('SMEMBERS', queues)) do
  waiting[#waiting + 1] = queue
  waiting[#waiting + 1] = redis.call('ZCARD', pending_name(queue))
end
local sticky = redis.call('ZCOUNT', results_name(), '+inf', '+inf')
local temporary = redis.call('ZCOUNT', results_name(), '(' .. int(now_ms), '(+inf')
return {'stats', counted('submissions'), counted('executions'),
  redis.call('HGETALL', stats_name('sweeps')), redis.call('HGET', stats_name('cache'), 'bytes') or '0', temporary,
  sticky, redis.call('ZCARD', leases_name()), redis.call('ZCARD', quarantine_name()), waiting}
