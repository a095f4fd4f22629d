-- ARGV: prefix, worker, lease_ms, 'register' | 'beat', n jobs the worker thinks it runs, field, value, …
-- Returns {'ok'} | {'jobs', id, …} (the jobs that are really its own, when the counts differ) |
--   {'dead'}: the lease lapsed, all its jobs went to others; register again under a new id
local wid = ARGV[2]
if ARGV[4] == 'beat' and not redis.call('ZSCORE', P .. 'workers', wid) then return { 'dead' } end
redis.call('ZADD', P .. 'workers', NOW + num(ARGV[3]), wid)
if #ARGV > 5 then redis.call('HSET', P .. 'worker:' .. wid, 'beat_ms', NOW, unpack(ARGV, 6)) end
if ARGV[4] == 'register' or redis.call('SCARD', P .. 'jobs:' .. wid) == num(ARGV[5]) then return { 'ok' } end
local reply = { 'jobs' }
for _, id in ipairs(redis.call('SMEMBERS', P .. 'jobs:' .. wid)) do reply[#reply + 1] = id end
return reply
