-- Let one request of a tenant in, or not, by its limits per minute. ARGV: prefix, tenant, requests to take: 1, or 0 to look
-- Returns {1 | 0, per kind (requests, tokens): limit or 0 for none, what is left, ms until the bucket is full,
--          ms until one is let in}
local tenant, n = ARGV[2], num(ARGV[3])
local limits, reply, wait = limits_of(tenant), { 1 }, 0
for _, kind in ipairs({ 'requests', 'tokens' }) do
  local per_minute = limits[kind .. '_per_minute']
  if per_minute then
    local level = bucket(tenant, kind, per_minute, 0)
    -- Tokens are taken by `submit`, which knows of how many it may be: there must be one left.
    if n > 0 and level < 1 then wait = math.max(wait, (1 - level) * 60000 / per_minute) end
    reply[#reply + 1] = per_minute
    reply[#reply + 1] = math.max(0, math.floor(level))
    reply[#reply + 1] = math.ceil((per_minute - level) * 60000 / per_minute)
  else
    for _ = 1, 3 do reply[#reply + 1] = 0 end
  end
end
if wait > 0 then
  reply[1] = 0
elseif n > 0 and limits.requests_per_minute then
  local per_minute = limits.requests_per_minute
  local level = bucket(tenant, 'requests', per_minute, n)
  reply[3] = math.max(0, math.floor(level))
  reply[4] = math.ceil((per_minute - level) * 60000 / per_minute)
end
reply[#reply + 1] = math.ceil(wait)
return reply
