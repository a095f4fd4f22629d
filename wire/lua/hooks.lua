-- Webhooks to be delivered, at least once each. ARGV: prefix,
--   'take', at most, hold_ms → {id, hook, state, ended_ms, attempts, …}: due ones; nobody else takes them for `hold_ms`
--   'done', id               → 1: delivered, or given up
--   'later', id, delay_ms    → 1: to be tried again
local hooks = P .. 'hooks'
if ARGV[2] == 'take' then
  local taken = {}
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', hooks, '-inf', NOW, 'LIMIT', 0, num(ARGV[3]))) do
    local f = redis.call('HMGET', P .. 'hook:' .. id, 'hook', 'state', 'ended_ms', 'attempts')
    if f[1] then
      redis.call('ZADD', hooks, NOW + num(ARGV[4]), id)
      for _, value in ipairs({ id, f[1], f[2], f[3], f[4] }) do taken[#taken + 1] = value end
    else
      redis.call('ZREM', hooks, id) -- three days were not enough
    end
  end
  return taken
end
local id = ARGV[3]
if ARGV[2] == 'done' then
  redis.call('ZREM', hooks, id)
  redis.call('DEL', P .. 'hook:' .. id)
elseif redis.call('EXISTS', P .. 'hook:' .. id) == 1 then
  redis.call('HINCRBY', P .. 'hook:' .. id, 'attempts', 1)
  redis.call('ZADD', hooks, NOW + num(ARGV[4]), id)
end
return 1
