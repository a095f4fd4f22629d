-- The housekeeping that any worker, collector or gateway may run; at most one run does work in 200 ms.
-- ARGV: prefix.  The lease and the longest gap between two runs that still counts as normal are the workers' own.
-- Returns {requeued, given up, expired, sent again, n due, id whose Celery links are to be sent, …}
local meta = P .. 'meta'
local settings = redis.call('HMGET', meta, 'lease_ms', 'normal_gap_ms')
local lease, normal_gap = tonumber(settings[1]) or 3000, tonumber(settings[2]) or 1500
local last = num(redis.call('HGET', meta, 'reaped_ms'))
if NOW - last < 200 and NOW >= last then return { 0, 0, 0, 0, 0 } end
redis.call('HSET', meta, 'reaped_ms', NOW)
local requeued, poisoned, expired, resent, released = 0, 0, 0, 0, 0

-- Nobody reaped for a while: Redis was away (or frozen, or restarted). That time is nobody's fault.
if last > 0 and NOW - last > normal_gap then
  for _, wid in ipairs(redis.call('ZRANGE', P .. 'workers', 0, -1)) do
    redis.call('ZADD', P .. 'workers', NOW + lease, wid)
  end
end
for _, wid in ipairs(redis.call('ZRANGEBYSCORE', P .. 'workers', '-inf', NOW, 'LIMIT', 0, 10)) do
  local r, p = bury(wid)
  requeued, poisoned = requeued + r, poisoned + p
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'deadlines', '-inf', NOW, 'LIMIT', 0, 200)) do
  local f = redis.call('HMGET', job_key(id), 'state', 'deadline_ms')
  if f[1] and not has_ended(f[1]) then
    local total = num(f[2]) <= NOW
    close(id, 'expired', 'expired', total and 'its deadline passed before it was complete'
      or 'it waited in the queue longer than it may')
    expired = expired + 1
  else
    redis.call('ZREM', P .. 'deadlines', id)
  end
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'due', '-inf', NOW, 'LIMIT', 0, 200)) do
  redis.call('ZREM', P .. 'due', id)
  local f = redis.call('HMGET', job_key(id), 'state', 'queue', 'priority', 'tokens')
  if f[1] == 'queued' then
    enqueue(id, f[2], f[3], num(f[4]) > 0) -- with tokens it is no delayed one: a worker has left it to another
    released = released + 1
  end
end

-- Lost messages: kombu pops a message, then records it; a worker that dies in between, or before it claims, loses it.
local buried = num(redis.call('HGET', meta, 'buried_ms'))
local this_second = math.floor(NOW / 1000)
for _, queue in ipairs(redis.call('SMEMBERS', P .. 'queues')) do
  local waiting = P .. 'queue:' .. queue
  if redis.call('EXISTS', waiting) == 1 then
    local order = redis.call('HGETALL', P .. 'order:' .. queue)
    for _, priority in ipairs({ '0', '3', '6' }) do
      local low = num(priority) * LANE
      local empty = redis.call('LLEN', list_key(queue, priority)) == 0
      -- By second: the highest order claimed at least SETTLE_MS ago.
      local settled = {}
      for k = 1, #order, 2 do
        local lane, second = string.match(order[k], '^lane(%d):(%d+)$')
        if lane == priority and num(second) * 1000 + 1000 + SETTLE_MS <= NOW then
          settled[#settled + 1] = { num(second) * 1000, num(order[k + 1]) }
        end
      end
      -- Oldest first: a job served out of order stands at the front.
      local ids = redis.call('ZRANGEBYSCORE', waiting, low, '(' .. (low + LANE), 'LIMIT', 0, 100)
      for _, id in ipairs(ids) do
        local f = redis.call('HMGET', job_key(id), 'sent_ms', 'order', 'worker')
        if not f[1] then
          redis.call('ZREM', waiting, id)
        elseif not (f[3] and f[3] ~= '' and redis.call('SISMEMBER', P .. 'held:' .. f[3], id) == 1) then
          local sent = num(f[1])
          local lost = empty and (NOW - sent >= SETTLE_MS or sent <= buried and NOW - buried >= ORPHAN_MS)
          for _, claim in ipairs(settled) do
            if claim[2] > num(f[2]) and claim[1] > sent then lost = true end
          end
          if lost then
            send(id, queue, priority, true)
            resent = resent + 1
          end
        end
      end
    end
  end
  if redis.call('HLEN', P .. 'order:' .. queue) > 200 then
    local order, old = redis.call('HKEYS', P .. 'order:' .. queue), {}
    for _, field in ipairs(order) do
      local second = string.match(field, '^lane%d:(%d+)$') or string.match(field, '^count(%d+)$')
      if second and this_second - num(second) > 60 then old[#old + 1] = field end
    end
    if #old > 0 then redis.call('HDEL', P .. 'order:' .. queue, unpack(old)) end
  end
end
redis.call('ZREMRANGEBYSCORE', P .. 'dead', '-inf', NOW)

-- kombu's record of a delivery whose worker died: nobody will acknowledge it. A hundred at a time, round and round.
local at = num(redis.call('HGET', meta, 'unacked_at'))
local tags = redis.call('ZRANGEBYSCORE', P .. 'unacked_index', '-inf', math.floor(NOW / 1000) - 60, 'LIMIT', at, 100)
local kept = 0
for _, tag in ipairs(tags) do
  local id = string.match(tag, '^(.+)%.%d+$')
  local state = id and redis.call('HGET', job_key(id), 'state')
  if id and (not state or has_ended(state)) then
    redis.call('HDEL', P .. 'unacked', tag)
    redis.call('ZREM', P .. 'unacked_index', tag)
  else
    kept = kept + 1
  end
end
redis.call('HSET', meta, 'unacked_at', #tags == 100 and at + kept or 0)

-- Our own watermark stands below Redis' limit: at the limit, what heals a full Redis would be refused too.
local info = redis.call('INFO', 'memory')
local limit = num(string.match(info, 'maxmemory:(%d+)'))
local used = num(string.match(info, 'used_memory:(%d+)'))
redis.call('HSET', meta, 'memory_percent', limit > 0 and math.floor(100 * used / limit) or 0)

local reply = { requeued, poisoned, expired, resent, released }
local outbox = redis.call('SRANDMEMBER', P .. 'outbox', 20)
for _, id in ipairs(outbox) do reply[#reply + 1] = id end
return reply
