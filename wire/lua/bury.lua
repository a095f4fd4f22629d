-- A worker is known to be dead (its guardian saw it die) or leaves: don't wait for the lease.
-- ARGV: prefix, worker.  Returns {requeued, given up}
return { bury(ARGV[2]) }
