-- Batches: many rows of a file, driven by whoever holds the batch's lease; all writes of a driver are fenced by it.
-- ARGV: prefix, 'create', id, digest, tenant, fixed, hook or '', at most → {'created'} | {'exists'} | {'conflict'} |
--   {'full'}: so many of the tenant's have not ended
-- ARGV: prefix, 'take', owner, lease_ms, at most → {id, …}: batches that nobody drives, the oldest first
-- ARGV: prefix, 'save', id, owner, lease_ms, keep_ms, field, value, … → {'ok', status} | {'fenced'}
-- ARGV: prefix, 'release', id, owner → {'ok'}
-- ARGV: prefix, 'cancel', id → {status now}
local op, id = ARGV[2], ARGV[3]
local key, active = P .. 'batch:' .. id, P .. 'batches_active'
local ENDED = { completed = true, failed = true, expired = true, cancelled = true }

if op == 'create' then
  local known = redis.call('HGET', key, 'digest')
  if known then return { known == ARGV[4] and 'exists' or 'conflict' } end
  local mine = 0
  for _, each in ipairs(redis.call('ZRANGE', active, 0, -1)) do
    if redis.call('HGET', P .. 'batch:' .. each, 'tenant') == ARGV[5] then mine = mine + 1 end
  end
  if mine >= num(ARGV[8]) then return { 'full' } end
  redis.call('HSET', key, 'digest', ARGV[4], 'tenant', ARGV[5], 'fixed', ARGV[6], 'status', 'validating',
    'created_ms', NOW, 'owner', '', 'lease_ms', 0)
  if ARGV[7] ~= '' then redis.call('HSET', key, 'hook', ARGV[7]) end
  redis.call('ZADD', P .. 'batches:' .. ARGV[5], NOW, id)
  redis.call('ZADD', active, NOW, id)
  return { 'created' }
end

if op == 'take' then
  local taken, most = {}, num(ARGV[5])
  for _, each in ipairs(redis.call('ZRANGE', active, 0, -1)) do
    if #taken >= most then break end
    local lease = redis.call('HGET', P .. 'batch:' .. each, 'lease_ms')
    if not lease then
      redis.call('ZREM', active, each)
    elseif num(lease) <= NOW then
      redis.call('HSET', P .. 'batch:' .. each, 'owner', ARGV[3], 'lease_ms', NOW + num(ARGV[4]))
      taken[#taken + 1] = each
    end
  end
  return taken
end

local f = redis.call('HMGET', key, 'status', 'owner', 'tenant', 'hook')
if op == 'cancel' then
  if f[1] == 'validating' or f[1] == 'in_progress' then
    redis.call('HSET', key, 'status', 'cancelling', 'cancelling_ms', NOW)
    return { 'cancelling' }
  end
  return { f[1] or 'gone' }
end
if f[2] ~= ARGV[4] then return { 'fenced' } end
if op == 'release' then
  redis.call('HSET', key, 'owner', '', 'lease_ms', 0)
  return { 'ok' }
end

if ENDED[f[1]] then return { 'ok', f[1] } end -- a retry of the call that ended it
redis.call('HSET', key, 'lease_ms', NOW + num(ARGV[5]))
local status = f[1]
for k = 7, #ARGV, 2 do
  local name, value = ARGV[k], ARGV[k + 1]
  if name == 'status' then
    -- A cancel that came meanwhile is heard; only an end follows it.
    if status ~= 'cancelling' or ENDED[value] then status = value end
    redis.call('HSETNX', key, status .. '_ms', NOW)
  elseif name == 'completed' or name == 'failed' then
    -- Rows that were counted by a driver that died are counted again by the next: never downwards.
    if num(value) > num(redis.call('HGET', key, name)) then redis.call('HSET', key, name, value) end
  else
    redis.call('HSET', key, name, value)
  end
end
redis.call('HSET', key, 'status', status)
if ENDED[status] then
  redis.call('ZREM', active, id)
  redis.call('PEXPIRE', key, num(ARGV[6]))
  if f[4] then notify(id, f[4], status) end
end
return { 'ok', status }
