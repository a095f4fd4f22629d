-- ARGV: prefix, id, …  Returns per job {state, seq, queue position or -1, waiting for a worker 0/1}; {''} if it is gone
local out = {}
for k = 2, #ARGV do
  local f = redis.call('HMGET', job_key(ARGV[k]), 'state', 'seq', 'queue')
  if f[1] then
    local rank = f[1] == 'queued' and redis.call('ZRANK', P .. 'queue:' .. f[3], ARGV[k]) or -1
    out[#out + 1] = { f[1], num(f[2]), rank or -1 }
  else
    out[#out + 1] = { '' }
  end
end
return out
