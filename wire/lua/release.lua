-- Hand a running job over: it goes to the next worker at once. Without a strike, unless its engine died under it.
-- ARGV: prefix, id, epoch, owner, 'handover' | 'died'.  Returns 'ok' | 'fenced' | 'gone'
local f = redis.call('HMGET', job_key(ARGV[2]), 'state', 'epoch', 'owner', 'handed_by')
if not f[1] then return 'gone' end
if f[4] == ARGV[4] then return 'ok' end
if f[1] ~= 'running' or f[2] ~= ARGV[3] or f[3] ~= ARGV[4] then return 'fenced' end
redis.call('HSET', job_key(ARGV[2]), 'handed_by', ARGV[4])
if ARGV[5] == 'died' then strike(ARGV[2], 'an engine') else requeue(ARGV[2]) end
return 'ok'
