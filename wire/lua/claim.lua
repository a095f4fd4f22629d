-- ARGV: prefix, id, worker, owner, 'claim' | 'hold'
-- Returns {'claimed', epoch, seq, request, prompt, fingerprint, strikes, deadline_ms, tokens, now_ms, options, has links 0/1} |
--   {'held'} (the worker keeps the message until it has room) | {'gone'} | {'ended', state} |
--   {'running'} (someone else has it) | {'unregistered'} (this worker's lease lapsed) |
--   {'elsewhere'} (only a worker of the engine and version that began it can go on with it, and there is one)
local id, wid, owner, mode = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local job = job_key(id)
if mode == 'claim' then redis.call('SREM', P .. 'held:' .. wid, id) end
local f = redis.call('HMGET', job, 'state', 'owner', 'queue', 'priority', 'order', 'deadline_ms', 'epoch',
  'strikes', 'tokens', 'fingerprint', 'model')
if not f[1] then return { 'gone' } end
if has_ended(f[1]) then return { 'ended', f[1] } end
if not redis.call('ZSCORE', P .. 'workers', wid) then return { 'unregistered' } end
if f[1] == 'running' and f[2] ~= owner then return { 'running' } end
local due = redis.call('ZSCORE', P .. 'deadlines', id)
if f[1] == 'queued' and due and num(due) <= NOW then
  close(id, 'expired', 'expired', 'it waited in the queue longer than it may')
  return { 'ended', 'expired' }
end
-- It would end here, for nobody goes on with what another version has begun: its message is sent again soon.
if f[1] == 'queued' and num(f[9]) > 0 and f[10] and f[10] ~= redis.call('HGET', P .. 'worker:' .. wid, 'fingerprint') then
  for _, other in ipairs(redis.call('ZRANGEBYSCORE', P .. 'workers', NOW, '+inf')) do
    local told = redis.call('HMGET', P .. 'worker:' .. other, 'model', 'fingerprint')
    if told[1] == f[11] and told[2] == f[10] then
      redis.call('ZREM', P .. 'queue:' .. f[3], id)
      redis.call('ZADD', P .. 'due', 'NX', NOW + ELSEWHERE_MS, id)
      return { 'elsewhere' }
    end
  end
end
if mode == 'hold' then
  redis.call('SADD', P .. 'held:' .. wid, id)
  redis.call('HSET', job, 'worker', wid)
  return { 'held' }
end
local epoch = num(f[7])
if f[1] == 'queued' then
  epoch = epoch + 1
  redis.call('HSET', job, 'state', 'running', 'owner', owner, 'worker', wid, 'epoch', epoch, 'claimed_ms', NOW)
  redis.call('HSETNX', job, 'first_claimed_ms', NOW)
  -- With one strike left it waits for its turn to run alone; until the worker says that it begins, no death is its own.
  if num(f[8]) >= MAX_STRIKES - 1 then redis.call('HSET', job, 'parked', epoch) end
  redis.call('ZREM', P .. 'queue:' .. f[3], id)
  redis.call('ZREM', P .. 'due', id)
  redis.call('SADD', P .. 'jobs:' .. wid, id)
  redis.call('ZADD', P .. 'deadlines', num(f[6]), id)
  -- Remember per second the highest order claimed in each lane: what the lost-message rule asks for.
  local order, second = P .. 'order:' .. f[3], math.floor(NOW / 1000)
  local lane = 'lane' .. f[4] .. ':' .. second
  local highest = redis.call('HGET', order, lane)
  if f[5] and (not highest or num(f[5]) > num(highest)) then redis.call('HSET', order, lane, f[5]) end
  redis.call('HINCRBY', order, 'count' .. second, 1)
end
local r = redis.call('HMGET', job, 'seq', 'request', 'prompt', 'fingerprint', 'strikes', 'deadline_ms', 'tokens', 'options',
  'media')
if r[9] then
  for entry in string.gmatch(r[9], '%S+') do want_media(entry, id, num(r[6]) + SETTLE_MS) end
end
return { 'claimed', epoch, num(r[1]), r[2], r[3] or '', r[4] or '', num(r[5]), num(r[6]), num(r[7]), NOW, r[8] or '{}',
  redis.call('HEXISTS', job, 'links') }
