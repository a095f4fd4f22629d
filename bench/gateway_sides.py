"""What `bench.gateway` measures with: an HTTP client that costs little, servers as child processes, CPU by process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from bench.overhead import Figures, Load, cpu_s, figures, paced

One = Callable[[str, float], Awaitable[list[float]]]
"""Run one chat; returns when its deliveries came, on `time.perf_counter`'s clock."""

_CONTENT = re.compile(rb'"content": ?"(?!")')
"""A chunk with text: vLLM and LiteLLM say the role first, with an empty one."""


@dataclass
class Side:
    figures: Figures
    gap_p99_all_ms: float
    """Of the time in which all streams ran: no job began or ended. The same as ``gap_p99_ms`` for several jobs each."""
    tokens_a_delivery: float
    tokens_s: float
    """Of all streams together, from the first job's scheduled start to the last one's end."""
    cpu_us: dict[str, float]
    """Per token, by process."""

    def __str__(self) -> str:
        cpu = ", ".join(f"{name} {us}" for name, us in self.cpu_us.items())
        steady = f"gap p99 while all ran {self.gap_p99_all_ms}"
        rate = f"{self.tokens_a_delivery} tokens a delivery, {self.tokens_s} tokens/s"
        return f"{self.figures}, {steady}, {rate}; us/token: {cpu}"


class _Chat(asyncio.Protocol):
    """One streamed chat, parsed less than by any real client: this process is not to set the pace."""

    def __init__(self, request: bytes, done: asyncio.Future[list[float]]) -> None:
        self._request, self._done = request, done
        self._arrivals: list[float] = []
        self._tail = b""

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if _CONTENT.search(data):
            self._arrivals.append(time.perf_counter())
        self._tail = data if len(data) >= 200 else self._tail[-200:] + data

    def connection_lost(self, error: Exception | None) -> None:
        if self._done.cancelled():
            return
        if b"[DONE]" in self._tail:
            self._done.set_result(self._arrivals)
        else:
            self._done.set_exception(error or AssertionError(self._tail))


def http_client(port: int, load: Load, key: str = "none", **more: Any) -> One:
    """Streams chats, a connection each; ``more`` goes into each body."""

    async def one(prompt: str, scheduled: float) -> list[float]:
        body = json.dumps({
            "model": "scripted", "messages": [{"role": "user", "content": prompt}], "stream": True, "temperature": 0,
            "max_tokens": load.tokens, **more,
        }).encode()  # fmt: skip
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
            f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        loop = asyncio.get_running_loop()
        done: asyncio.Future[list[float]] = loop.create_future()
        await loop.create_connection(lambda: _Chat(head.encode() + body, done), "127.0.0.1", port)
        return await done

    return one


async def measured(load: Load, one: One, processes: Mapping[str, list[int]]) -> Side:
    """``processes`` are pids by what the table calls them; this one comes last."""
    await one("warm", time.perf_counter())
    pids = {**processes, "client": [os.getpid()]}

    def used() -> list[float]:
        return [sum(map(cpu_s, each)) for each in pids.values()]

    async def kept(prompt: str, scheduled: float) -> list[float]:
        seen.append(await one(prompt, scheduled))
        return seen[-1]

    seen: list[list[float]] = []
    before, began = used(), time.perf_counter()
    jobs = await paced(load, kept)
    after, took_s = used(), time.perf_counter() - began
    tokens = load.streams * load.jobs * load.tokens
    us = [round((b - a) * 1e6 / tokens, 1) for a, b in zip(before, after, strict=True)]
    a_delivery = round(tokens / sum(map(len, jobs)), 2)
    told = figures(load, jobs)
    steady_ms = _steady_gap_p99_ms(seen) if load.jobs == 1 else told.gap_p99_ms
    return Side(told, steady_ms, a_delivery, round(tokens / took_s, 1), dict(zip(pids, us, strict=True)))


def _steady_gap_p99_ms(arrivals: list[list[float]]) -> float:
    begin, end = max(each[0] for each in arrivals), min(each[-1] for each in arrivals)
    gaps = sorted(b - a for each in arrivals for a, b in itertools.pairwise(each) if begin < a and b < end)
    return round(gaps[int(len(gaps) * 0.99)] * 1000, 3) if gaps else 0.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    command: list[str], port: int, env: Mapping[str, str] | None = None, path: str = "/health", wait_s: float = 90
) -> Iterator[list[int]]:
    """A server as a child, once it answers; yields its pids, its own children's too."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env={**os.environ, **(env or {})}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            until = time.monotonic() + wait_s
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2).close()
                    break
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"{command[:4]} does not serve:\n{log.read()[-2000:].decode()}")
                time.sleep(0.1)
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            yield [each.pid for each in family]
        finally:
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.kill()
            process.wait()
            for each in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
