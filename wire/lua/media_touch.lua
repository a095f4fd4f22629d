-- Which media are there? Those that are stay for a while more, for the job that is about to name them.
-- ARGV: prefix, ttl_ms, '<scope>:<sha256>', …  Returns per medium 1 (it is there) or 0 (upload it)
local out = {}
for k = 3, #ARGV do
  out[#out + 1] = redis.call('EXISTS', P .. 'media:' .. ARGV[k])
  if out[#out] == 1 then want_media(ARGV[k], 'upload', NOW + num(ARGV[2])) end
end
return out
