-- Shared by all scripts: prepended to each. ARGV[1] is always the prefix "tokenfleet:<fleet>:".
-- Names are built here as wire/keys.py spells them; a fleet lives on one Redis, never on a cluster.
local P = ARGV[1]
local time = redis.call('TIME')
local NOW = time[1] * 1000 + math.floor(time[2] / 1000)
local SETTLE_MS = 5000       -- a message is lost only if a later job was claimed this long ago
local ORPHAN_MS = 2000       -- or its queue is empty, and a worker that may have popped it has been dead for so long
local ELSEWHERE_MS = 100     -- until a message is sent again that the wrong worker has taken
local MAX_STRIKES = 3
local LANE = 17592186044416  -- 2^44: a lane's width in a queue's scores
local MIDDLE = 8796093022208 -- 2^43: new jobs count up from here, handed-over ones down

local function job_key(id) return P .. 'job:' .. id end
local function log_key(id) return P .. 'log:' .. id end
local function num(text) return tonumber(text) or 0 end

-- Names of kombu's priority lists: the queue itself for 0, queue<sep>3, queue<sep>6.
local function list_key(queue, priority)
  if priority == '0' then return queue end
  return queue .. '\6\22' .. priority
end

-- A Celery protocol-2 message that holds the job's id and nothing else.
local function envelope(id, queue, priority, tag)
  return '{"body":"[[\\"' .. id .. '\\"],{},{\\"callbacks\\":null,\\"errbacks\\":null,\\"chain\\":null,\\"chord\\":null}]",'
    .. '"content-encoding":"utf-8","content-type":"application/json",'
    .. '"headers":{"lang":"py","task":"tokenfleet.run","id":"' .. id .. '","root_id":"' .. id .. '","parent_id":null,'
    .. '"group":null,"shadow":null,"eta":null,"expires":null,"retries":0,"timelimit":[null,null],'
    .. '"argsrepr":"()","kwargsrepr":"{}","origin":"tokenfleet","ignore_result":true,'
    .. '"replaced_task_nesting":0,"stamped_headers":null,"stamps":{}},'
    .. '"properties":{"correlation_id":"' .. id .. '","reply_to":"","delivery_mode":2,'
    .. '"delivery_info":{"exchange":"","routing_key":"' .. queue .. '"},"priority":' .. priority .. ','
    .. '"delivery_tag":"' .. tag .. '"}}'
end

-- Send (again) the job's Celery message. A handed-over job goes to the end that is served next.
local function send(id, queue, priority, next_up)
  local job = job_key(id)
  local tag = id .. '.' .. redis.call('HINCRBY', job, 'sends', 1)
  redis.call('HSET', job, 'sent_ms', NOW)
  redis.call(next_up and 'RPUSH' or 'LPUSH', list_key(queue, priority), envelope(id, queue, priority, tag))
end

local function enqueue(id, queue, priority, next_up)
  local n
  if next_up then
    n = redis.call('HINCRBY', P .. 'order:' .. queue, 'front' .. priority, -1)
  else
    n = redis.call('HINCRBY', P .. 'order:' .. queue, 'back' .. priority, 1)
  end
  redis.call('HSET', job_key(id), 'order', n)
  redis.call('ZADD', P .. 'queue:' .. queue, num(priority) * LANE + MIDDLE + n, id)
  send(id, queue, priority, next_up)
end

local function publish(id, seq, events)
  redis.call('PUBLISH', P .. 'live:' .. id, '{"seq":' .. seq .. ',"events":[' .. events .. ']}')
end

-- A tenant's bucket of requests or tokens: at most `per_minute` in it, refilled evenly. Takes `n`, or gives back where it
-- is negative; it may get below zero. Returns its level. Asked again after a lost reply it takes twice: too strict once.
local function bucket(tenant, name, per_minute, n)
  local key = P .. 'rate:' .. tenant
  local f = redis.call('HMGET', key, name, name .. '_ms')
  local level = per_minute
  if f[1] then
    level = math.min(per_minute, tonumber(f[1]) + math.max(0, NOW - num(f[2])) * per_minute / 60000)
  end
  if n ~= 0 then
    level = math.min(per_minute, level - n)
    redis.call('HSET', key, name, tostring(level), name .. '_ms', NOW)
    local full_ms = math.ceil((per_minute - level) * 60000 / per_minute) + 1000
    if redis.call('PEXPIRE', key, full_ms, 'NX') == 0 then redis.call('PEXPIRE', key, full_ms, 'GT') end
  end
  return level
end

local function limits_of(tenant)
  local stored = redis.call('HGET', P .. 'limits', tenant)
  return stored and cjson.decode(stored) or {}
end

-- Tell a caller's webhook about an end: any gateway delivers what stands here. `hook` is JSON: where, for whom, of what.
local function notify(id, hook, state)
  local key = P .. 'hook:' .. id
  redis.call('HSET', key, 'hook', hook, 'state', state, 'ended_ms', NOW, 'attempts', 0)
  redis.call('PEXPIRE', key, 259200000)
  redis.call('ZADD', P .. 'hooks', NOW, id)
end

-- Media that a job needs: '<scope>:<sha256> <scope>:<sha256> ...'. P media:<entry> holds the bytes (or the name of
-- their file), P media-jobs:<entry> who wants them until when; both end with the last of these times.
local function want_media(entry, who, until_ms)
  local jobs = P .. 'media-jobs:' .. entry
  redis.call('ZADD', jobs, 'GT', until_ms, who)
  local last = redis.call('ZRANGE', jobs, -1, -1, 'WITHSCORES')[2]
  redis.call('PEXPIREAT', P .. 'media:' .. entry, last)
  redis.call('PEXPIREAT', jobs, last)
end

local function leave_media(entries, id, kept_ms)
  for entry in string.gmatch(entries, '%S+') do
    redis.call('ZREM', P .. 'media-jobs:' .. entry, id)
    if redis.call('EXISTS', P .. 'media:' .. entry) == 1 then
      want_media(entry, 'kept', NOW + kept_ms)
    end
  end
end

-- The end of a job: exactly one terminal event, last in its log. Callers have checked that it has not ended.
-- `celery` is what AsyncResult reads.
local function finish(id, state, seq, event, celery)
  local job = job_key(id)
  local f = redis.call('HMGET', job, 'queue', 'priority', 'worker', 'retention_ms', 'sends', 'links', 'dead_ms', 'state',
    'tenant', 'hook', 'prompt_tokens', 'tokens', 'media', 'charged')
  local queue, keep = f[1], num(f[4])
  redis.pcall('XADD', log_key(id), 'NOMKSTREAM', seq .. '-0', 'e', event) -- no log, or not ours: it ends all the same
  redis.call('HSET', job, 'state', state, 'seq', seq, 'ended_ms', NOW, 'terminal', event, 'owner', '')
  redis.call('ZREM', P .. 'deadlines', id)
  redis.call('ZREM', P .. 'due', id)
  if f[3] then redis.call('SREM', P .. 'jobs:' .. f[3], id) end
  if state == 'failed' and f[7] then
    keep = num(f[7])
    redis.call('ZADD', P .. 'dead', NOW + keep, id)
  end
  if f[6] and f[6] ~= '' then redis.call('SADD', P .. 'outbox', id) end
  if f[9] then
    redis.call('ZREM', P .. 'tenant:' .. f[9], id)
    local per_minute = f[2] ~= '6' and limits_of(f[9]).tokens_per_minute
    -- `submit` has taken an estimate: what was too much of it comes back.
    if per_minute then bucket(f[9], 'tokens', per_minute, num(f[11]) + num(f[12]) - num(f[14])) end
  end
  if f[10] then notify(id, f[10], state) end
  redis.call('PEXPIRE', job, keep)
  redis.call('PEXPIRE', log_key(id), keep)
  if f[13] then
    -- The next turn of a conversation has them again; so may a dead letter. A batch's results are only read.
    leave_media(f[13], id, f[2] == '6' and state ~= 'failed' and math.min(keep, 600000) or keep)
  end
  redis.call('SET', 'celery-task-meta-' .. id, celery, 'PX', keep)
  redis.call('PUBLISH', 'celery-task-meta-' .. id, celery)
  -- Deliveries that nobody will acknowledge any more (their worker died) would stay for ever.
  local list = list_key(queue, f[2])
  local waiting = redis.call('ZREM', P .. 'queue:' .. queue, id) == 1 and redis.call('LLEN', list) <= 500
  for k = 1, num(f[5]) do
    local tag = id .. '.' .. k
    redis.call('HDEL', P .. 'unacked', tag)
    redis.call('ZREM', P .. 'unacked_index', tag)
    if waiting then redis.call('LREM', list, 1, envelope(id, queue, f[2], tag)) end
  end
  publish(id, seq, event)
end

local function usage_of(id)
  local f = redis.call('HMGET', job_key(id), 'prompt_tokens', 'tokens', 'epoch')
  return '"usage":{"prompt_tokens":' .. num(f[1]) .. ',"completion_tokens":' .. num(f[2])
    .. ',"attempts":' .. math.max(num(f[3]), 0) .. '}'
end

local function celery_failure(id, status, exc_type, exc_module, message)
  return '{"status":"' .. status .. '","result":{"exc_type":"' .. exc_type .. '","exc_message":[' .. cjson.encode(message)
    .. '],"exc_module":"' .. exc_module .. '"},"traceback":null,"children":[],"date_done":null,"task_id":"' .. id .. '"}'
end

-- End a job from outside its worker: cancelled, expired, or given up.
local function close(id, state, code, message)
  local f = redis.call('HMGET', job_key(id), 'seq', 'worker', 'state')
  local event, celery
  if state == 'cancelled' then
    event = '{"type":"cancelled",' .. usage_of(id) .. ',"reason":' .. cjson.encode(message) .. '}'
    celery = celery_failure(id, 'REVOKED', 'TaskRevokedError', 'celery.exceptions', message)
  else
    event = '{"type":"' .. state .. '","error":{"code":"' .. code .. '","message":' .. cjson.encode(message)
      .. ',"retryable":true},' .. usage_of(id) .. '}'
    celery = celery_failure(id, 'FAILURE', state == 'expired' and 'JobExpired' or 'JobFailed',
      'tokenfleet.wire.errors', message)
  end
  finish(id, state, num(f[1]) + 1, event, celery)
  if f[3] == 'running' and f[2] then redis.call('PUBLISH', P .. 'ctl:' .. f[2], 'cancel ' .. id) end
end

local function has_ended(state) return state ~= 'queued' and state ~= 'running' end

-- Give a running job back to its queue, to be served next. Its total deadline goes on.
local function requeue(id)
  local job = job_key(id)
  local f = redis.call('HMGET', job, 'queue', 'priority', 'worker', 'deadline_ms')
  if f[3] then redis.call('SREM', P .. 'jobs:' .. f[3], id) end
  redis.call('HSET', job, 'state', 'queued', 'owner', '', 'worker', '')
  redis.call('ZADD', P .. 'deadlines', num(f[4]), id)
  enqueue(id, f[1], f[2], true)
end

-- A worker, or its engine, died under a running job. A death under a job that had made no new progress is a strike
-- (unless it was only waiting for its turn to run alone); the third ends it. Else it goes to the next worker.
-- Returns whether it was given up.
local function strike(id, who)
  local job = job_key(id)
  local f = redis.call('HMGET', job, 'epoch', 'progress', 'strikes', 'parked', 'deaths')
  local strikes = num(f[3])
  if f[2] == f[1] then strikes = 0 elseif f[4] ~= f[1] then strikes = strikes + 1 end
  local deaths = string.sub((f[5] or '') .. NOW .. ' ' .. who .. ' died in attempt ' .. f[1] .. '\n', -600)
  redis.call('HSET', job, 'strikes', strikes, 'deaths', deaths)
  if strikes < MAX_STRIKES then
    requeue(id)
    return false
  end
  redis.call('HSETNX', job, 'dead_ms', 604800000)
  close(id, 'failed', 'poison', 'the job was given up: ' .. strikes .. ' workers died under it without a new token')
  return true
end

-- A worker is dead: each of its jobs goes to the next one. Returns how many were requeued and how many given up.
local function bury(wid)
  local requeued, poisoned = 0, 0
  for _, id in ipairs(redis.call('SMEMBERS', P .. 'jobs:' .. wid)) do
    local f = redis.call('HMGET', job_key(id), 'state', 'worker')
    if f[1] == 'running' and f[2] == wid then
      if strike(id, 'worker ' .. wid) then
        poisoned = poisoned + 1
      else
        requeued = requeued + 1
      end
    end
  end
  for _, id in ipairs(redis.call('SMEMBERS', P .. 'held:' .. wid)) do
    local f = redis.call('HMGET', job_key(id), 'state', 'queue', 'priority')
    if f[1] == 'queued' then send(id, f[2], f[3], true) end
  end
  redis.call('DEL', P .. 'jobs:' .. wid, P .. 'held:' .. wid, P .. 'worker:' .. wid)
  redis.call('ZREM', P .. 'workers', wid)
  redis.call('HSET', P .. 'meta', 'buried_ms', NOW)
  redis.call('PUBLISH', P .. 'ctl:' .. wid, 'fenced')
  return requeued, poisoned
end
