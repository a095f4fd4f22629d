-- Store one medium. Not under allow-oom: it is refused by our own watermark, and by Redis itself, before it could hurt.
-- ARGV: prefix, '<scope>:<sha256>', ttl_ms, size in bytes, 'data' | 'file', the bytes | the file's name,
--   name of a file that it had and that is lost (optional)
-- Returns {'stored'} | {'exists'} (from somebody else: a file of ours is not needed) | {'memory_full', percent}
local key, how, value = P .. 'media:' .. ARGV[2], ARGV[5], ARGV[6]
local until_ms = NOW + num(ARGV[3])
if redis.call('EXISTS', key) == 1 then
  local file = redis.call('HGET', key, 'file')
  if not file or file ~= ARGV[7] then
    want_media(ARGV[2], 'upload', until_ms)
    return { how == 'file' and file == value and 'stored' or 'exists' }
  end
  redis.call('HDEL', key, 'file')
end
if how == 'data' then
  -- Measured now, not by the last reap: a few media could fill what the sample left free.
  local info = redis.call('INFO', 'memory')
  local limit = num(string.match(info, 'maxmemory:(%d+)'))
  local used = num(string.match(info, 'used_memory:(%d+)')) -- this script's own arguments included
  if limit > 0 and used >= 0.8 * limit then return { 'memory_full', math.floor(100 * used / limit) } end
end
redis.call('HSET', key, how, value, 'bytes', ARGV[4])
want_media(ARGV[2], 'upload', until_ms)
return { 'stored' }
