-- A reader had more of the job's log than Redis has now: end it, before others read other text in the same places.
-- ARGV: prefix, id, seq that was read.  Returns 'lost' | 'ended' | 'gone' | 'kept' (it is all there)
local f = redis.call('HMGET', job_key(ARGV[2]), 'state', 'seq')
if not f[1] then return 'gone' end
if has_ended(f[1]) then return 'ended' end
if num(f[2]) >= num(ARGV[3]) then return 'kept' end
close(ARGV[2], 'failed', 'lost_state', 'Redis lost a part of what was delivered')
return 'lost'
