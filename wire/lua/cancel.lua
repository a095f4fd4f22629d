-- ARGV: prefix, id, reason.  Returns {'cancelled'} | {'ended', state} | {'gone'}
local state = redis.call('HGET', job_key(ARGV[2]), 'state')
if not state then return { 'gone' } end
if has_ended(state) then return { 'ended', state } end
close(ARGV[2], 'cancelled', 'cancelled', ARGV[3])
return { 'cancelled' }
