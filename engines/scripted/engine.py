"""A scripted engine: many sequences, one timer, tokens from `model.py` or `salted.py`."""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import itertools
import os
import signal
import time
from collections import deque
from collections.abc import AsyncGenerator

from tokenfleet.engines.base import EngineInfo, Sequence, TokenChunk
from tokenfleet.engines.checks import already_over, check_sequence, check_texts
from tokenfleet.engines.mailbox import Mailbox
from tokenfleet.engines.scripted.directives import Fault
from tokenfleet.engines.scripted.options import ScriptedOptions
from tokenfleet.engines.scripted.record import Record
from tokenfleet.engines.scripted.run import Run
from tokenfleet.engines.scripted.tokenizer import VOCAB_SIZE, ScriptedTokenizer
from tokenfleet.wire.errors import EngineDead, EngineError

_VERSION = "1"


class ScriptedEngine:
    """Implements `Engine`. ``tokenizer`` is the one its ids belong to."""

    def __init__(self, options: ScriptedOptions | None = None) -> None:
        self.options = options or ScriptedOptions()
        self.tokenizer = ScriptedTokenizer()
        self._info = EngineInfo(
            name="scripted",
            version=_VERSION,
            model=self.options.label,
            fingerprint=f"scripted-{_VERSION}-{self.options.label}-{'salted' if self.options.salted else 'plain'}",
            context_tokens=self.options.context_tokens,
            slots=self.options.slots,
            vocab_size=VOCAB_SIZE,
            adapters=self.options.adapters,
            can_score=True,
            modalities=tuple(self.options.modalities),
            uncontinued=self.options.uncontinued,
        )
        self._record: Record | None = None
        self._running: set[Run] = set()
        self._waiting: deque[Run] = deque()
        self._due: list[tuple[float, int, Run]] = []  # a heap: (when, tie-break, run)
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._steps = 0
        self._dead: str | None = None
        self._is_frozen = False

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def steps(self) -> int:
        return self._steps

    @property
    def running(self) -> int:
        return len(self._running)

    async def start(self) -> None:
        if self.options.record_path is not None and self._record is None:
            self._record = Record(self.options.record_path)
            self._record.write("start", label=self.options.label)

    async def generate(self, sequence: Sequence) -> AsyncGenerator[TokenChunk, None]:
        """Raises what faults ask for, too."""
        await self.check()
        if (over := already_over(sequence)) is not None:
            yield over
            return
        check_sequence(self._info, sequence)
        run = Run(sequence, self.options, self.tokenizer, Mailbox())
        self._waiting.append(run)
        self._admit()
        try:
            while True:
                chunk = await run.mailbox.take()
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            self._leave(run, "abort")

    async def score(self, texts_ids: list[tuple[int, ...]], *, adapter: str | None = None) -> list[float]:
        """Between -1 and 1, from the ids alone (and the adapter's name)."""
        await self.check()
        check_texts(self._info, texts_ids, adapter, hint="")
        salt = (adapter or "").encode()
        hashes = (hashlib.blake2b(repr(ids).encode() + salt, digest_size=8).digest() for ids in texts_ids)
        self._steps += 1
        return [int.from_bytes(each, "big") / 2**63 - 1 for each in hashes]

    async def check(self) -> None:
        if self._dead is not None:
            raise EngineDead(self._dead)

    async def close(self) -> None:
        for run in [*self._waiting, *self._running]:
            run.mailbox.put((), reason="cancelled")
            self._leave(run, "abort")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due.clear()
        self._dead = self._dead or "The scripted engine is closed."
        if self._record is not None:
            self._record.close()
            self._record = None

    # -- slots --------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.options.slots:
            run = self._waiting.popleft()
            self._running.add(run)
            self._steps += 1
            if self._record is not None:
                self._record.write("prefill", **run.describe())
            run.begin(asyncio.get_running_loop().time())
            self._schedule(run)
        self._set_timer()

    def _leave(self, run: Run, reason: str) -> None:
        """Free whatever ``run`` holds. Does nothing the second time."""
        if run.is_over:
            return
        run.is_over = True  # its entry in the heap is thrown away when it comes up
        if run in self._running:
            self._running.remove(run)
            if self._record is not None:
                self._record.write("end", sequence_id=run.sequence_id, reason=reason, tokens=run.index)
        else:
            self._waiting.remove(run)
        if not self._running:
            self._due.clear()
        if self._waiting:
            self._admit()

    # -- time ---------------------------------------------------------------------------------------------------------

    def _schedule(self, run: Run) -> None:
        heapq.heappush(self._due, (run.due, next(self._order), run))

    def _set_timer(self) -> None:
        if not self._due or self._is_frozen:
            return
        when = self._due[0][0]
        if self._timer is not None:
            if self._timer_at <= when:
                return
            self._timer.cancel()
        self._timer_at = when
        self._timer = asyncio.get_running_loop().call_at(when, self._tick)

    def _tick(self) -> None:
        """Make every token that is due. One that is late makes up for it, several tokens in one step."""
        self._timer = None
        now = asyncio.get_running_loop().time()
        made: dict[Run, None] = {}  # ordered; a late run is in it once
        record: list[tuple[str, int, int, int | None]] | None = [] if self._record is not None else None
        due, most_ms = self._due, self.options.most_behind_ms
        most_s = None if most_ms is None else most_ms / 1000
        again: list[Run] = []
        while due and due[0][0] <= now and not self._is_frozen:
            run = heapq.heappop(due)[2]
            if run.is_over:
                continue
            if most_s is not None and (late_s := now - run.due - most_s) > 0:
                run.put_off(late_s)
            if run.fault is not None and run.fault.at == run.index:
                self._flush(made, record)
                made, record = {}, [] if record is not None else None
                if not self._commit(run, run.fault):
                    continue
            token_id = run.step()
            if record is not None:
                record.append((run.sequence_id, run.index - 1, token_id, run.salt))
            made[run] = None
            if run.reason is None:
                if self.options.token_ms:
                    self._schedule(run)  # if it is still late, it comes up again in this step
                else:
                    again.append(run)  # its next token is due at once: in the next turn of the loop
        for run in again:
            self._schedule(run)
        self._flush(made, record)
        self._set_timer()

    def _flush(self, made: dict[Run, None], record: list[tuple[str, int, int, int | None]] | None) -> None:
        """Deliver a step's tokens; the record is written first, so that it never lacks what somebody has read."""
        if not made:
            return
        self._steps += 1
        if record and self._record is not None:
            self._record.write("tokens", made=record)
        for run in made:
            run.deliver()
            if run.reason is not None:
                self._leave(run, run.reason)

    # -- faults -------------------------------------------------------------------------------------------------------

    def _commit(self, run: Run, fault: Fault) -> bool:
        """Do what the fault says. True if the token is made after all."""
        run.fault = None
        if self._record is not None:
            self._record.write("fault", sequence_id=run.sequence_id, kind=fault.kind, index=run.index)
        match fault.kind:
            case "raise" | "oom":
                code = "out_of_memory" if fault.kind == "oom" else None
                run.mailbox.fail(EngineError(f"A fault was asked for at token {fault.at}.", code=code))
                self._leave(run, "error")
            case "dead":
                self._die(fault.at)
            case "doom":
                asyncio.get_running_loop().call_later(fault.seconds, self._die, fault.at)
                return True
            case "hang":
                pass  # it keeps its slot and is never due again
            case "freeze":
                self._is_frozen = True
            case "block":
                time.sleep(fault.seconds)  # the point: nothing else on this loop runs
                return True
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(1)
        return False

    def _die(self, at: int) -> None:
        self._dead = f"A dead engine was asked for at token {at}."
        for each in [*self._waiting, *self._running]:  # in this order nobody is admitted any more
            each.mailbox.fail(EngineDead(self._dead))
            self._leave(each, "error")
