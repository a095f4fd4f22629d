-- ARGV: prefix, id, digest, model, queue, priority, delay_ms, queue_ttl_ms, deadline_ms, max_queued, field, value, …
-- Returns {'accepted', n waiting before it} | {'exists'} | {'conflict'} | {'unknown_model'} |
--         {'memory_full', percent} | {'queue_full', n, claims per second in the last 10 s} |
--         {'tenant_jobs', limit} | {'tenant_queue', limit} | {'tenant_tokens', limit, ms until it fits} |
--         {'media_gone', '<scope>:<sha256>', …} (what the field `media` names and is not there: upload it again)
local id, digest, model, queue, priority = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local delay, queue_ttl, deadline, max_queued = num(ARGV[7]), num(ARGV[8]), num(ARGV[9]), num(ARGV[10])
local job = job_key(id)
local known = redis.call('HGET', job, 'digest')
if known then return { known == digest and 'exists' or 'conflict' } end
if redis.call('HEXISTS', P .. 'models', model) == 0 then return { 'unknown_model' } end
local memory = num(redis.call('HGET', P .. 'meta', 'memory_percent'))
if memory >= 80 then return { 'memory_full', memory } end
local waiting = redis.call('ZCARD', P .. 'queue:' .. queue)
if waiting >= max_queued then
  local claimed, second = 0, math.floor(NOW / 1000)
  for k = 1, 10 do claimed = claimed + num(redis.call('HGET', P .. 'order:' .. queue, 'count' .. (second - k))) end
  return { 'queue_full', waiting, tostring(claimed / 10) }
end
local tenant, media, estimate
for k = 11, #ARGV, 2 do
  if ARGV[k] == 'tenant' then
    tenant = ARGV[k + 1]
  elseif ARGV[k] == 'media' then
    media = ARGV[k + 1]
  elseif ARGV[k] == 'charged' then
    estimate = k + 1
  end
end
if media then
  local gone = { 'media_gone' }
  for entry in string.gmatch(media, '%S+') do
    if redis.call('EXISTS', P .. 'media:' .. entry) == 0 then gone[#gone + 1] = entry end
  end
  if #gone > 1 then return gone end
end
local charged
if tenant then
  local mine, limits = P .. 'tenant:' .. tenant, limits_of(tenant)
  redis.call('ZREMRANGEBYSCORE', mine, '-inf', NOW - 60000) -- jobs that Redis lost: no script ended them
  local n = redis.call('ZCARD', mine)
  if limits.concurrent_jobs and n >= limits.concurrent_jobs then return { 'tenant_jobs', limits.concurrent_jobs } end
  if limits.queue_share then
    local share = math.max(1, math.floor(limits.queue_share * max_queued))
    if n >= share and redis.call('ZINTERCARD', 2, mine, P .. 'queue:' .. queue, 'LIMIT', share) >= share then
      return { 'tenant_queue', share }
    end
  end
  local per_minute = limits.tokens_per_minute
  if per_minute and estimate and priority ~= '6' then
    -- What may be used is taken now and settled at the end. More than a minute's worth needs a full bucket.
    charged = num(ARGV[estimate])
    local short = math.min(charged, per_minute) - bucket(tenant, 'tokens', per_minute, 0)
    if short > 0 then return { 'tenant_tokens', per_minute, math.ceil(short * 60000 / per_minute) } end
    bucket(tenant, 'tokens', per_minute, charged)
  end
  redis.call('ZADD', mine, NOW + deadline, id)
end
-- Accepted from here on.
if media then
  local until_ms = NOW + math.min(deadline, delay + queue_ttl) + SETTLE_MS
  for entry in string.gmatch(media, '%S+') do
    -- What was uploaded has found its job. (Who has uploaded the same for another may have to do it again.)
    redis.call('ZREM', P .. 'media-jobs:' .. entry, 'upload')
    want_media(entry, id, until_ms)
  end
end
local fields = { 'state', 'queued', 'digest', digest, 'model', model, 'queue', queue, 'priority', priority,
  'epoch', 0, 'owner', '', 'worker', '', 'seq', 1, 'tokens', 0, 'strikes', 0, 'submitted_ms', NOW,
  'deadline_ms', NOW + deadline }
for k = 11, #ARGV do fields[#fields + 1] = ARGV[k] end
if estimate then fields[#fields - #ARGV + estimate] = charged or 0 end
redis.call('HSET', job, unpack(fields))
local event = '{"type":"queued","t_ms":' .. NOW .. ',"model":' .. cjson.encode(model) .. '}'
redis.call('XADD', log_key(id), '1-0', 'e', event)
redis.call('ZADD', P .. 'deadlines', NOW + math.min(deadline, delay + queue_ttl), id)
if delay > 0 then
  redis.call('ZADD', P .. 'due', NOW + delay, id)
else
  enqueue(id, queue, priority, false)
end
publish(id, 1, event)
return { 'accepted', waiting }
