-- Records of stored files. ARGV: prefix, 'add', id, record, tenant, bytes, ends_ms or 0, bytes the tenant may store
--   → {'added'} | {'exists', record} | {'full', bytes stored}
-- ARGV: prefix, 'drop', id → {'dropped', record} | {'gone'}
local id = ARGV[3]
local key, used = P .. 'file:' .. id, P .. 'file_bytes'
local known = redis.call('GET', key)
if ARGV[2] == 'add' then
  if known then return { 'exists', known } end
  local tenant, bytes, ends = ARGV[5], num(ARGV[6]), num(ARGV[7])
  local stored = num(redis.call('HGET', used, tenant))
  local is_full = redis.call('ZCARD', P .. 'files:' .. tenant) >= 10000 -- small ones fill Redis, too
  if stored + bytes > num(ARGV[8]) or (is_full and num(ARGV[8]) < 2 ^ 53) then return { 'full', stored } end
  redis.call('SET', key, ARGV[4])
  redis.call('HINCRBY', used, tenant, bytes)
  redis.call('ZADD', P .. 'files:' .. tenant, NOW, id)
  if ends > 0 then redis.call('ZADD', P .. 'file_ends', ends, id) end
  return { 'added' }
end
redis.call('ZREM', P .. 'file_ends', id)
if not known then return { 'gone' } end
local record = cjson.decode(known)
local tenant = record.tenant or ''
redis.call('DEL', key)
redis.call('ZREM', P .. 'files:' .. tenant, id)
if redis.call('HINCRBY', used, tenant, -record.bytes) <= 0 then redis.call('HDEL', used, tenant) end
return { 'dropped', known }
