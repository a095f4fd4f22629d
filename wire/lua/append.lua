-- Append events of many jobs, durable first, live second; end those that are complete.
-- ARGV: prefix, n jobs, then per job: id, epoch, owner, first seq, tokens delivered so far (all choices),
--   n fields, field, value, …, n events, event, …, final state or '', and if final: what AsyncResult shall read
-- Returns per job: 'ok' | 'fenced' (someone else owns it) | 'ended' | 'gone' (expired, or Redis lost it) |
--   'gap' (Redis lost the end of its log, or something else wrote there: the job has ended with lost_state)
local at, out = 3, {}
for j = 1, num(ARGV[2]) do
  local id, epoch, owner, first, tokens = ARGV[at], ARGV[at + 1], ARGV[at + 2], num(ARGV[at + 3]), ARGV[at + 4]
  local n_fields = num(ARGV[at + 5])
  local fields = at + 6
  local events = fields + 2 * n_fields + 1
  local n_events = num(ARGV[events - 1])
  local final = ARGV[events + n_events]
  at = events + n_events + (final == '' and 1 or 2)
  local job = job_key(id)
  local f = redis.call('HMGET', job, 'state', 'epoch', 'owner', 'seq', 'last_owner', 'tokens')
  local status = 'ok'
  if not f[1] then
    status = 'gone'
  elseif has_ended(f[1]) then
    -- A retry of the call that ended it is a success, not a fence.
    status = (f[5] == owner and num(f[4]) == first + n_events - 1) and 'ok' or 'ended'
  elseif f[1] ~= 'running' or f[2] ~= epoch or f[3] ~= owner then
    status = 'fenced'
  elseif first > num(f[4]) + 1 then
    status = 'gap'
  else
    local seq = num(f[4])
    local last = first + n_events - 1
    local upto = final == '' and last or last - 1
    local fresh = {}
    for s = seq + 1, upto do
      local event = ARGV[events + s - first]
      -- pcall: whatever else stands in one job's log must not stop the others of this call.
      local added = redis.pcall('XADD', log_key(id), 'NOMKSTREAM', s .. '-0', 'e', event)
      if not added then status = 'gone' break end
      if type(added) == 'table' then status = 'gap' break end
      fresh[#fresh + 1] = event
    end
    if status == 'ok' then
      -- max: a call may arrive after its own retry and after later ones.
      local set = { 'seq', math.max(seq, upto), 'tokens', math.max(num(tokens), num(f[6])) }
      if num(tokens) > num(f[6]) then
        set[#set + 1] = 'progress'
        set[#set + 1] = epoch
        if num(f[6]) == 0 then
          set[#set + 1] = 'first_token_ms'
          set[#set + 1] = NOW
        end
      end
      for k = fields, fields + 2 * n_fields - 1 do set[#set + 1] = ARGV[k] end
      redis.call('HSET', job, unpack(set))
      if #fresh > 0 then publish(id, seq + 1, table.concat(fresh, ',')) end
      if final ~= '' then
        redis.call('HSET', job, 'last_owner', owner)
        finish(id, final, last, ARGV[events + n_events - 1], ARGV[events + n_events + 1])
      end
    end
  end
  -- Other text must never come after what somebody may have read: it can't go on.
  if status == 'gap' then close(id, 'failed', 'lost_state', 'Redis lost a part of what was delivered') end
  out[j] = status
end
return out
