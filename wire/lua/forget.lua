-- Delete an ended job before its retention is over. ARGV: prefix, id
-- Returns {'forgotten'} | {'gone'} | {'running', state}: cancel it first.
local id = ARGV[2]
local state = redis.call('HGET', job_key(id), 'state')
if not state then return { 'gone' } end
if not has_ended(state) then return { 'running', state } end
redis.call('DEL', job_key(id), log_key(id), 'celery-task-meta-' .. id)
redis.call('ZREM', P .. 'dead', id)
return { 'forgotten' }
