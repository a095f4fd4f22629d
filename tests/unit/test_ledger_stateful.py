"""The ledger's scripts under random interleavings of two workers, zombies, a reaper, a canceller and lost replies.

Each call is made on a real Valkey and on `ledger_model.Ledger`; replies and, after every step, all of the data are
compared. A reply is lost by making the call twice and looking at the second answer only.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import redis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.servers import RedisServer, new_fleet_name
from tests.unit.ledger_model import Append, Attempt, Job, Ledger
from tokenfleet.wire import scripts
from tokenfleet.wire.keys import Keys, new_id
from tokenfleet.wire.ledger import Batch

MODEL = "m"
LANES = (0, 3, 6)
FOR_EVER_MS = 10**12
lost_reply = st.booleans()
which = st.integers(0, 2**16)
rarely = st.sampled_from([False] * 7 + [True])
often = st.sampled_from([True] * 3 + [False])


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self, client: redis.Redis) -> None:
        super().__init__()
        self.client: Any = client
        self.keys = Keys(new_fleet_name())
        self.model = Ledger()
        self.numbers = itertools.count()
        self.attempts: list[Attempt] = []
        self.workers: list[str] = []  # all ids ever registered: a zombie calls under its old one
        self.hands: dict[str, set[str]] = {}  # message popped by a worker that has not asked the ledger yet
        self.lost: set[str] = set()
        self.heard: dict[str, list[str]] = {}
        self.channel: Any = client.pubsub(ignore_subscribe_messages=True)
        self.channel.psubscribe(self.keys.live("*"))

    # -- calling ------------------------------------------------------------------------------------------------------

    def run_script(self, name: scripts.Name, *args: scripts.Arg) -> Any:
        return scripts.run_blocking(self.client, name, self.keys.prefix, *args)

    def same(self, call: Callable[[], Any], expected: Callable[[], Any], *, again: bool) -> Any:
        """Make the call (twice, if its first reply is lost) on both; the replies must agree. Returns the last one."""
        for _ in range(1 + again):
            replied, wanted = call(), expected()
            assert replied == wanted, f"script: {replied}, promised: {wanted}"
        return wanted

    def now_ms(self) -> int:
        seconds, micros = self.client.time()
        return int(seconds) * 1000 + int(micros) // 1000

    # -- choosing: mostly what still matters, sometimes what is over --------------------------------------------------

    def job(self, number: int) -> Job:
        jobs = list(self.model.jobs.values())
        living = [job for job in jobs if not job.is_ended and not job.is_gone]
        return (living if living and number % 8 else jobs)[number // 8 % len(living if living and number % 8 else jobs)]

    def worker(self, number: int) -> str:
        """One of the two youngest, mostly."""
        return self.workers[-1 - number // 8 % min(2 if number % 8 else 99, len(self.workers))]

    def attempt(self, number: int) -> Attempt | None:
        """Mostly one that owns its job."""
        owning = [a for a in self.attempts if a.job.owner == a.owner and not a.job.is_gone]
        some = owning if owning and number % 4 else self.attempts
        return some[number // 4 % len(some)] if some else None

    # -- rules --------------------------------------------------------------------------------------------------------

    @initialize()
    def serve(self) -> None:
        self.queue = self.keys.queue(MODEL)
        self.run_script("serve", MODEL, self.queue, "{}", "incarnation", 3000, 10_000)
        for _ in range(2):
            self.register()
            self.submit(lane=0, is_delayed=False, again=False)

    @rule()
    def register(self) -> None:
        worker = new_id()
        assert self.run_script("beat", worker, FOR_EVER_MS, "register", 0, "host", "h")[0] == b"ok"
        self.model.workers.add(worker)
        self.workers.append(worker)
        self.hands[worker] = set()

    @rule(lane=st.sampled_from(LANES), is_delayed=rarely, again=lost_reply)
    def submit(self, lane: int, is_delayed: bool, again: bool) -> None:
        job_id = new_id()
        self.same(
            lambda: self._submit(job_id, "body", lane, is_delayed),
            lambda: self.model.submit(job_id, "body", lane, is_delayed=is_delayed), again=again,
        )  # fmt: skip

    def _submit(self, job_id: str, body: str, lane: int, is_delayed: bool) -> str:
        reply = self.run_script(
            "submit", job_id, body, MODEL, self.queue, lane, 10**9 if is_delayed else 0, 10**9, 10**10, 1000,
            "request", body, "retention_ms", 60_000,
        )  # fmt: skip
        return reply[0].decode()

    @rule(j=which, body=st.sampled_from(["body", "another"]))
    def submit_again(self, j: int, body: str) -> None:
        job = self.job(j)
        if job.is_gone:
            return  # a new job under an old id: only a client that retries for longer than the retention makes one
        self.same(
            lambda: self._submit(job.id, body, job.lane, False),
            lambda: self.model.submit(job.id, body, job.lane, is_delayed=False), again=False,
        )  # fmt: skip

    @rule(w=which)
    def pop_message(self, w: int) -> None:
        """kombu takes a message; it dies with the worker unless the ledger hears of it."""
        worker = self.worker(w)
        for lane in LANES:
            if message := self.client.rpop(self._list(lane)):
                if worker in self.model.workers:
                    self.hands[worker].add(id_of(message))
                else:
                    self.lost.add(id_of(message))
                return

    @rule(j=which, w=which, is_waiting=often, again=lost_reply)
    def claim(self, j: int, w: int, is_waiting: bool, again: bool) -> None:
        waiting = [job for job in self.model.jobs.values() if job.state == "queued" and not job.is_gone]
        self._claim(waiting[j % len(waiting)] if waiting and is_waiting else self.job(j), self.worker(w), again)

    def _claim(self, job: Job, worker: str, again: bool) -> None:
        owner = new_id()
        reply = self.same(
            lambda: claimed(self.run_script("claim", job.id, worker, owner, "claim")),
            lambda: self.model.claim(job, worker, owner), again=again,
        )  # fmt: skip
        if reply[0] != "unregistered":
            self.hands[worker].discard(job.id)
        if reply[0] == "claimed":
            self.attempts.append(Attempt(job, job.epoch, owner, len(job.log), job.tokens))

    @rule(j=which, w=which, again=lost_reply)
    def hold(self, j: int, w: int, again: bool) -> None:
        job, worker = self.job(j), self.worker(w)
        reply = self.same(
            lambda: claimed(self.run_script("claim", job.id, worker, "", "hold")),
            lambda: self.model.hold(job, worker), again=again,
        )  # fmt: skip
        if reply[0] != "unregistered":
            self.hands[worker].discard(job.id)

    @rule(a=which, n=st.integers(1, 3), final=st.sampled_from(["", "", "", "", "", "finished", "failed"]),
          tokens=st.integers(0, 2), skipped=rarely, again=lost_reply)  # fmt: skip
    def append(self, a: int, n: int, final: str, tokens: int, skipped: bool, again: bool) -> None:
        """By any attempt there ever was. ``skipped``: as if Redis had lost the end of the log."""
        if (attempt := self.attempt(a)) is None:
            return
        events = tuple(json.dumps({"type": "delta", "n": next(self.numbers)}) for _ in range(n))
        call = Append(attempt.seq + 1 + skipped, attempt.tokens + tokens, events, final)
        status = self._append(attempt, call, again=again)
        attempt.calls.append(call)
        if status == "ok":
            attempt.seq, attempt.tokens = attempt.seq + n, attempt.tokens + tokens

    @rule(a=which, w=which, how=st.sampled_from(["handover", "died", "died"]), times=st.integers(1, 4))
    def taken_over(self, a: int, w: int, how: str, times: int) -> None:
        """Given up and claimed again, perhaps until it has no strike left: its earlier attempts are zombies then."""
        owning = [x for x in self.attempts if is_running(x.job) and x.owner == x.job.owner]
        alive = [worker for worker in self.workers if worker in self.model.workers]
        if not owning or not alive:
            return
        job = owning[a % len(owning)].job
        for _ in range(times):
            if is_running(job):
                self._release(next(x for x in self.attempts if x.owner == job.owner), how, again=False)
                self._claim(job, alive[w % len(alive)], again=False)

    @rule(a=which, n=st.integers(1, 3), final=st.sampled_from(["", "", "finished"]))
    def zombie_appends(self, a: int, n: int, final: str) -> None:
        """While its job runs elsewhere; its next seq may well be the log's next one too."""
        if zombies := [x for x in self.attempts if is_running(x.job) and x.owner != x.job.owner]:
            zombie = zombies[a % len(zombies)]
            events = tuple(json.dumps({"type": "delta", "n": next(self.numbers)}) for _ in range(n))
            self._append(zombie, Append(zombie.seq + 1, zombie.tokens, events, final), again=False)

    @rule(a=which)
    def append_arrives_late(self, a: int) -> None:
        """An older call once more, after whatever happened since: it was on the way all the time."""
        attempt = self.attempt(a)
        if attempt is not None and attempt.calls:
            self._append(attempt, attempt.calls[a % len(attempt.calls)], again=False)

    def _append(self, attempt: Attempt, call: Append, *, again: bool) -> str:
        batch = Batch(
            attempt.job.id, attempt.epoch, attempt.owner, call.first, call.tokens,
            [event.encode() for event in call.events], {} if call.events else {"parked": ""}, call.final, b"{}",
        )  # fmt: skip
        return self.same(
            lambda: self.run_script("append", 1, *batch.args())[0].decode(),
            lambda: self.model.append(attempt, call), again=again,
        )  # fmt: skip

    @rule(j=which, is_so=rarely, again=lost_reply)
    def cancel(self, j: int, is_so: bool, again: bool) -> None:
        if not is_so:
            return
        job = self.job(j)
        self.same(
            lambda: tuple(part.decode() for part in self.run_script("cancel", job.id, "enough")),
            lambda: self.model.cancel(job), again=again,
        )  # fmt: skip

    @rule(a=which, again=lost_reply)
    def begin(self, a: int, again: bool) -> None:
        """A job with one strike left has its turn: from here on a death is its own doing."""
        if (attempt := self.attempt(a)) is not None:
            self._append(attempt, Append(attempt.seq + 1, attempt.tokens, (), ""), again=again)

    @rule(a=which, died=st.booleans(), again=lost_reply)
    def release(self, a: int, died: bool, again: bool) -> None:
        if (attempt := self.attempt(a)) is not None:
            self._release(attempt, "died" if died else "handover", again=again)

    def _release(self, attempt: Attempt, how: str, *, again: bool) -> None:
        self.same(
            lambda: self.run_script("release", attempt.job.id, attempt.epoch, attempt.owner, how).decode(),
            lambda: self.model.release(attempt, died=how == "died"), again=again,
        )  # fmt: skip

    @rule(w=which, error=st.integers(0, 1))
    def beat(self, w: int, error: int) -> None:
        worker = self.worker(w)
        own = {job.id for job in self.model.jobs.values() if job.state == "running" and job.worker == worker}
        reply = self.run_script("beat", worker, FOR_EVER_MS, "beat", len(own) + error)
        if worker not in self.model.workers:
            assert reply == [b"dead"]
        elif error:
            assert {i.decode() for i in reply[1:]} == own
        else:
            assert reply == [b"ok"]

    @rule(w=which, again=lost_reply)
    def bury(self, w: int, again: bool) -> None:
        worker = self.worker(w)
        self.same(lambda: tuple(self.run_script("bury", worker)), lambda: self.model.bury(worker), again=again)
        self._dies(worker)

    def _dies(self, worker: str) -> None:
        self.lost |= self.hands[worker]
        self.hands[worker] = set()

    @rule(j=which, is_so=rarely)
    def overdue(self, j: int, is_so: bool) -> None:
        if is_so:
            self._make_overdue(self.job(j))

    def _make_overdue(self, job: Job) -> None:
        if not job.is_ended and not job.is_gone:
            job.is_overdue = True
            self.client.hset(self.keys.job(job.id), "deadline_ms", 1)
            self.client.zadd(f"{self.keys.prefix}deadlines", {job.id: 1})

    @rule(j=which, w=which, is_so=rarely, again=lost_reply)
    def overdue_when_its_message_comes(self, j: int, w: int, is_so: bool, again: bool) -> None:
        """No reaper has seen it yet."""
        waiting = [job for job in self.model.jobs.values() if job.state == "queued" and not job.is_gone]
        if waiting and is_so:
            self._make_overdue(waiting[j % len(waiting)])
            self._claim(waiting[j % len(waiting)], self.worker(w), again)

    @rule()
    def due(self) -> None:
        for job in self.model.jobs.values():
            self.client.zadd(f"{self.keys.prefix}due", {job.id: 1}, xx=True)

    @rule(w=which, is_lapsed=st.booleans(), was_away=st.booleans())
    def reap(self, w: int, is_lapsed: bool, was_away: bool) -> None:
        """``was_away``: Redis itself was, so that nobody's lease counts as lapsed."""
        worker = self.worker(w)
        if is_lapsed and worker in self.model.workers:
            self.client.zadd(self.keys.workers, {worker: 1}, xx=True)
        reply = self._reap(60_000 if was_away else 1_000)
        requeued = given_up = 0
        if is_lapsed and worker in self.model.workers and not was_away:
            requeued, given_up = self.model.bury(worker)
            self._dies(worker)
        expired = [job for job in self.model.jobs.values() if job.is_overdue and not job.is_gone]
        for job in expired:
            self.model.close(job, "expired")
        assert reply[:3] == [requeued, given_up, len(expired)]
        self._take_over_due()

    def _reap(self, since_last_ms: int) -> list[Any]:
        self.client.hset(self.keys.meta, "reaped_ms", self.now_ms() - since_last_ms)
        return self.run_script("reap")

    def _take_over_due(self) -> None:
        """What the reaper sent since it was due; the model has no time."""
        waiting = {i.decode() for i in self.client.zrange(f"{self.keys.prefix}due", 0, -1)}
        for job in self.model.jobs.values():
            if job.is_delayed and not job.is_gone and job.id not in waiting:
                assert job.id in self._messages(), "it was due, and no message was sent"
                job.is_delayed = False

    @rule(since=st.sampled_from(["long ago", "a death", "just now"]))
    def settle(self, since: str) -> None:
        """Five seconds pass, or two since a worker's death. In a lane with no messages left, those of all its waiting
        jobs are lost: sent again. Not what was sent just now, and after that death."""
        self.reap(w=0, is_lapsed=False, was_away=False)
        now = self.now_ms()
        sent = {"long ago": 1, "a death": now - 2200, "just now": now}[since]
        self.client.hset(self.keys.meta, "buried_ms", 0 if since == "long ago" else now - 2100)
        pipe = self.client.pipeline(transaction=False)
        for job in self.model.jobs.values():
            if job.state == "queued" and not job.is_gone:
                pipe.hset(self.keys.job(job.id), "sent_ms", sent)
        pipe.execute()
        empty = {lane for lane in LANES if not self.client.llen(self._list(lane))}
        before = self._messages()
        self._reap(1_000)
        after = self._messages()
        for job in self.model.jobs.values():
            if job.state == "queued" and not job.is_gone and not job.is_delayed and not before[job.id]:
                is_held = job.id in self.model.held.get(job.worker, ())
                is_lost = since != "just now" and job.lane in empty and not is_held
                assert bool(after[job.id]) == is_lost
        self.lost -= set(after)

    @rule(j=which, is_so=rarely, again=lost_reply)
    def reader_had_more(self, j: int, is_so: bool, again: bool) -> None:
        job = self.job(j)
        seq = len(job.log) + is_so
        self.same(
            lambda: self.run_script("lost", job.id, seq).decode(), lambda: self.model.lost(job, seq), again=again
        )  # fmt: skip

    @rule(j=which, is_so=rarely)
    def redis_loses(self, j: int, is_so: bool) -> None:
        if not is_so:
            return
        job = self.job(j)
        self.client.delete(self.keys.job(job.id), self.keys.log(job.id))
        job.is_gone = True

    # -- what must hold after each step -------------------------------------------------------------------------------

    @invariant()
    def data_is_as_promised(self) -> None:
        living = [job for job in self.model.jobs.values() if not job.is_gone]
        p = self.keys.prefix
        pipe = self.client.pipeline(transaction=True)
        for name in ("deadlines", "due", f"queue:{self.queue}"):
            pipe.zrange(f"{p}{name}", 0, -1)
        for worker in self.hands:
            pipe.smembers(f"{p}jobs:{worker}")
        for job in living:
            pipe.hgetall(self.keys.job(job.id))
            pipe.xrange(self.keys.log(job.id))
            pipe.pttl(self.keys.job(job.id))
            pipe.pttl(self.keys.log(job.id))
            pipe.exists(f"celery-task-meta-{job.id}")
        replies: Iterator[Any] = iter(pipe.execute())
        deadlines, due, queue = ({i.decode() for i in next(replies)} for _ in range(3))
        running = {worker: {i.decode() for i in next(replies)} for worker in self.hands}
        self._hear()
        messages = self._messages()
        for job in living:
            entry = {name.decode(): value.decode() for name, value in next(replies).items()}
            log, ttls, has_result = next(replies), (next(replies), next(replies)), next(replies)
            assert [seq for seq, _ in log] == [b"%d-0" % (k + 1) for k in range(len(job.log))], "seq has a gap"
            texts = [fields[b"e"].decode() for _, fields in log]
            assert [own_words(text, wanted) for text, wanted in zip(texts, job.log, strict=True)] == job.log
            assert self.heard[job.id] == texts, "the channel said something else than the log"
            assert sum(is_terminal(text) for text in texts) <= 1
            assert (entry["state"], int(entry["epoch"]), entry["owner"]) == (job.state, job.epoch, job.owner)
            assert (int(entry["seq"]), int(entry["tokens"])) == (len(job.log), job.tokens)
            assert int(entry["strikes"]) == job.strikes <= 3
            is_waiting = job.state == "queued"
            assert (job.id in deadlines) == (not job.is_ended)
            assert (job.id in due) == job.is_delayed
            assert (job.id in queue) == (is_waiting and not job.is_delayed)
            assert [worker for worker, own in running.items() if job.id in own] == [job.worker] * (
                job.state == "running"
            )
            assert all((ttl > 0) == job.is_ended for ttl in ttls)
            assert bool(has_result) == job.is_ended
            if is_waiting and not job.is_delayed:
                assert (
                    messages[job.id]
                    or job.id in self.lost
                    or any(job.id in hand for hand in self.hands.values())
                    or any(job.id in held for held in self.model.held.values())
                ), "queued, and nothing will ever bring it to a worker"

    def _hear(self) -> None:
        """Take what the channels said; the answer to a ping comes after it."""
        self.channel.ping()
        while (message := self.channel.get_message(timeout=5.0)) is None or message["type"] != "pong":
            if message is not None:
                said = json.loads(message["data"])
                heard = self.heard.setdefault(message["channel"].decode().removeprefix(self.keys.live("")), [])
                assert said["seq"] == len(heard) + 1, "said twice, or not at all"
                raw = message["data"].decode().partition('"events":[')[2].removesuffix("]}")
                heard += split_events(raw, said["events"])

    def _messages(self) -> Counter[str]:
        return Counter(id_of(m) for lane in LANES for m in self.client.lrange(self._list(lane), 0, -1))

    def _list(self, lane: int) -> str:
        return self.queue if lane == 0 else f"{self.queue}\x06\x16{lane}"

    def teardown(self) -> None:
        """End everything: what is left then must expire by itself (I8)."""
        p = self.keys.prefix
        try:
            if not hasattr(self, "queue"):
                return
            for job in self.model.jobs.values():
                self.run_script("cancel", job.id, "the end")
                self.client.zadd(f"{p}deadlines", {job.id: 1}, xx=True)
                self.client.zadd(f"{p}due", {job.id: 1}, xx=True)
            for worker in self.hands:
                self.run_script("bury", worker)
            for job in self.model.jobs.values():
                self.client.zadd(f"{p}dead", {job.id: 1}, xx=True)  # seven days pass
            self._reap(1_000)
            left = [key.decode() for key in self.client.scan_iter(f"{p}*") if self.client.pttl(key) == -1]
            names = {key.removeprefix(p) for key in left}
            assert names <= {"models", "queues", "meta", f"order:{self.queue}"}, names
            for lane in LANES:
                self.client.delete(self._list(lane))  # messages of ended jobs are a worker's to throw away
        finally:
            self.channel.close()


def is_running(job: Job) -> bool:
    return job.state == "running" and not job.is_gone


def claimed(reply: list[Any]) -> tuple[str, ...]:
    """The part of a claim's reply that the model has too: epoch, seq, tokens, strikes."""
    if reply[0] != b"claimed":
        return tuple(part.decode() for part in reply)
    return ("claimed", str(reply[1]), str(reply[2]), str(reply[8]), str(reply[6]))


def id_of(message: bytes) -> str:
    return str(json.loads(message)["headers"]["id"])


def own_words(text: str, wanted: str) -> str:
    """Events that Lua writes are known by their type, ours by their text."""
    return json.loads(text)["type"] if not wanted.startswith("{") else text


def is_terminal(text: str) -> bool:
    return json.loads(text)["type"] in ("finished", "failed", "cancelled", "expired")


def split_events(raw: str, events: list[Any]) -> list[str]:
    """The very texts of the events that stand comma-separated in ``raw``."""
    texts, decoder, at = [], json.JSONDecoder(), 0
    for event in events:
        value, end = decoder.raw_decode(raw, at)
        assert value == event
        texts.append(raw[at:end])
        at = end + 1
    return texts


def test_scripts_keep_their_promises_under_any_interleaving(shared_redis: RedisServer) -> None:
    with shared_redis.client() as client:
        run_state_machine_as_test(
            lambda: LedgerMachine(client),
            settings=settings(
                max_examples=80,
                stateful_step_count=50,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                report_multiple_bugs=False,
            ),
        )


def test_who_waits_to_run_alone_takes_no_strike(shared_redis: RedisServer) -> None:
    """With one strike left a death counts only once the job's turn has begun."""
    with shared_redis.client() as client:
        keys = Keys(new_fleet_name())
        job, key = new_id(), ""

        def call(name: scripts.Name, *args: scripts.Arg) -> Any:
            return scripts.run_blocking(client, name, keys.prefix, *args)

        def attempt(*, begins: bool = False) -> tuple[bytes, bytes]:
            owner = new_id()
            epoch = call("claim", job, worker, owner, "claim")[1]
            if begins:
                batch = Batch(job, epoch, owner, 2, 0, [], {"parked": ""})
                assert call("append", 1, *batch.args()) == [b"ok"]
            assert call("release", job, epoch, owner, "died") == b"ok"
            return tuple(client.hmget(key, "state", "strikes"))

        worker, key = new_id(), keys.job(job)
        call("serve", MODEL, keys.queue(MODEL), "{}", "incarnation", 3000, 10_000)
        call("beat", worker, FOR_EVER_MS, "register", 0)
        call(
            "submit", job, "d", MODEL, keys.queue(MODEL), 0, 0, 10**9, 10**10, 1000, "request", "r", "retention_ms", 99
        )
        assert [attempt(), attempt()] == [(b"queued", b"1"), (b"queued", b"2")]
        assert [attempt() for _ in range(3)] == [(b"queued", b"2")] * 3
        assert attempt(begins=True) == (b"failed", b"3")


def test_what_waited_too_long_expires_when_it_is_claimed(shared_redis: RedisServer) -> None:
    """No reaper has been by: it must not run late for that."""
    with shared_redis.client() as client:
        keys, job, worker = Keys(new_fleet_name()), new_id(), new_id()

        def call(name: scripts.Name, *args: scripts.Arg) -> Any:
            return scripts.run_blocking(client, name, keys.prefix, *args)

        call("serve", MODEL, keys.queue(MODEL), "{}", "incarnation", 3000, 10_000)
        call("beat", worker, FOR_EVER_MS, "register", 0)
        call("submit", job, "d", MODEL, keys.queue(MODEL), 0, 0, 1, 10**10, 1000, "request", "r", "retention_ms", 9999)
        due_ms = client.zscore(f"{keys.prefix}deadlines", job)
        while client.time()[0] * 1000 <= due_ms + 1000:  # polls Redis' own clock
            pass
        assert call("claim", job, worker, new_id(), "claim") == [b"ended", b"expired"]
        assert client.hget(keys.job(job), "state") == b"expired"
