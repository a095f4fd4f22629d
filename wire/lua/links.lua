-- Send the Celery messages that follow an ended job, once: only who takes the job out of the outbox sends.
-- ARGV: prefix, id, list key, message, list key, message, …  Returns 1 if they were sent, 0 if somebody had done it.
if redis.call('SREM', P .. 'outbox', ARGV[2]) == 0 then return 0 end
for k = 3, #ARGV, 2 do redis.call('LPUSH', ARGV[k], ARGV[k + 1]) end
return 1
