"""A batch from upload to output file: rows a second, and the memory and CPU time of each process.

    python -m bench.batch [--rows 5000] [--tokens 8] [--window N] [--kill-every SECONDS] [--spy FILE]

One gateway, one worker with the scripted engine (TTFT 20 ms, 5 ms a token), the local fleet's Redis with AOF. At the
end every ``custom_id`` must stand exactly once in the output or the error file; one row in 1,000 is bad on purpose.
``--kill-every`` kills the gateway (SIGKILL) so often and starts another. ``--spy`` profiles the first gateway.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import redis

from bench.gateway_sides import free_port, running
from tokenfleet import Client
from tokenfleet.producer.local_fleet import ensure
from tokenfleet.wire.local_files import LocalFleetConfig

ENDED = ("completed", "failed", "expired", "cancelled")
_BAD_EVERY = 1000


def write_rows(path: Path, rows: int, tokens: int) -> None:
    with path.open("w") as file:
        for k in range(rows):
            body: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": f"Row {k}."}]}
            body["max_tokens"] = -1 if k % _BAD_EVERY == 7 else tokens
            file.write(
                json.dumps({"custom_id": f"row-{k}", "method": "POST", "url": "/v1/chat/completions", "body": body})
            )
            file.write("\n")


class Watch:
    """The most memory (RSS, in MB) and the CPU time (s) of processes, by role, over their replacements."""

    def __init__(self) -> None:
        self.most_mb: dict[str, float] = {}
        self._cpu_s: dict[tuple[str, int], float] = {}

    def look(self, role: str, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.Error):
            for each in (process, *process.children(recursive=True)):
                times = each.cpu_times()
                self._cpu_s[role, each.pid] = times.user + times.system
            self.most_mb[role] = max(self.most_mb.get(role, 0.0), process.memory_info().rss / 1e6)

    def cpu_s(self) -> dict[str, float]:
        total: collections.Counter[str] = collections.Counter()
        for (role, _), seconds in self._cpu_s.items():
            total[role] += seconds  # type: ignore[assignment]
        return dict(total)


@contextlib.contextmanager
def gateway(env: dict[str, str], port: int) -> Iterator[psutil.Process]:
    command = [sys.executable, "-m", "tokenfleet.producer.gateway.serve"]
    with running(command, port, {**env, "TOKENFLEET_GATEWAY_PORT": str(port)}) as pids:
        yield psutil.Process(pids[0])


def exactly_once(http: httpx.Client, batch: dict[str, Any], rows: int) -> tuple[int, int]:
    """Rows in the output and in the errors. Fails if one is missing or twice."""
    seen = bytearray(rows)
    counts = []
    for name in ("output_file_id", "error_file_id"):
        n = 0
        if batch[name]:
            with http.stream("GET", f"/v1/files/{batch[name]}/content") as reply:
                for line in reply.iter_lines():
                    seen[int(json.loads(line)["custom_id"].removeprefix("row-"))] += 1
                    n += 1
        counts.append(n)
    assert seen == bytearray(b"\1" * rows), "a row is missing, or came twice"
    return counts[0], counts[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--window", type=int)
    parser.add_argument("--kill-every", type=float, metavar="SECONDS")
    parser.add_argument("--spy", metavar="FILE")
    asked = parser.parse_args()
    config = LocalFleetConfig(
        worker={"model": "scripted", "engine": "scripted", "slots": 256,
                "engine_args": {"ttft_ms": 20.0, "token_ms": 5.0, "slots": 512}},
        persistent=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, ensure(config=config, private=True) as local:
        local.wait_ready()
        env = {
            "TOKENFLEET_GATEWAY_REDIS_URL": local.url,
            "TOKENFLEET_GATEWAY_FLEET": local.fleet,
            "TOKENFLEET_GATEWAY_STORAGE": folder,
        }
        if asked.window:
            env["TOKENFLEET_GATEWAY_BATCH_WINDOW"] = str(asked.window)
        path = Path(folder) / "rows.jsonl"
        write_rows(path, asked.rows, asked.tokens)
        with redis.from_url(local.url) as server, Client(local.url, fleet=local.fleet) as client:
            others = {"redis": psutil.Process(server.info("server")["process_id"])}
            others["worker"] = psutil.Process(int(client.workers()[0]["pid"]))
        run(asked, env, path, others)


def run(asked: argparse.Namespace, env: dict[str, str], path: Path, others: dict[str, psutil.Process]) -> None:
    port, watch, spy = free_port(), Watch(), None
    context = contextlib.ExitStack()
    with contextlib.ExitStack() as whole, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        whole.push(lambda *_: context.close())
        process = context.enter_context(gateway(env, port))
        with path.open("rb") as file:
            upload = http.post("/v1/files", files={"file": ("rows.jsonl", file)}, data={"purpose": "batch"}).json()
        wanted = {"input_file_id": upload["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        began_s, kills, killed_s = time.monotonic(), 0, time.monotonic()
        batch = http.post("/v1/batches", json=wanted).json()
        if asked.spy:
            spy = subprocess.Popen(
                ["py-spy", "record", "-d", "20", "-f", "raw", "-o", asked.spy, "-p", str(process.pid)]
            )
        said_s = began_s
        while batch["status"] not in ENDED:
            time.sleep(0.5)
            watch.look("gateway", process)
            for role, each in others.items():
                watch.look(role, each)
            now_s = time.monotonic()
            if asked.kill_every and now_s - killed_s > asked.kill_every:
                context.close()
                process = context.enter_context(gateway(env, port))
                kills, killed_s = kills + 1, time.monotonic()
            batch = http.get(f"/v1/batches/{batch['id']}").json()
            if now_s - said_s > 30:
                said_s, done = now_s, batch["request_counts"]["completed"]
                print(f"  {now_s - began_s:5.0f} s  {done} rows, {done / (now_s - began_s):.0f}/s", flush=True)
        took_s = time.monotonic() - began_s
        good, bad = exactly_once(http, batch, asked.rows)
    if spy:
        spy.wait()
    rate = asked.rows / took_s
    print(f"{batch['status']}: {asked.rows} rows of {asked.tokens} tokens in {took_s:.1f} s, {rate:.0f} rows/s")
    print(f"  {good} in the output, {bad} in the errors, each custom_id exactly once; {kills} gateways killed")
    print("  most memory (MB): " + ", ".join(f"{role} {mb:.0f}" for role, mb in watch.most_mb.items()))
    print("  CPU (ms a row): " + ", ".join(f"{role} {s * 1000 / asked.rows:.2f}" for role, s in watch.cpu_s().items()))


if __name__ == "__main__":
    main()
