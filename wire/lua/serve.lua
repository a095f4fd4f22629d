-- Put a served model into the registry.
-- ARGV: prefix, model, queue, JSON of the served model, nonce, lease_ms, normal_gap_ms
-- Returns the data set's incarnation id: it changes when Redis comes back empty.
redis.call('HSET', P .. 'models', ARGV[2], ARGV[4])
redis.call('SADD', P .. 'queues', ARGV[3])
redis.call('HSETNX', P .. 'meta', 'incarnation', ARGV[5])
redis.call('HSET', P .. 'meta', 'lease_ms', ARGV[6], 'normal_gap_ms', ARGV[7])
return redis.call('HGET', P .. 'meta', 'incarnation')
