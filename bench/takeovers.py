"""How long streams of vLLM or SGLang stand still when the worker that makes them is killed, on this machine's CPU.

    .venv-vllm/bin/python -m bench.takeovers [--rounds 5] [--chats 6] [--at 200]

Two workers, chats in turns without an adapter and with two; once each has ``--at`` tokens, the busier worker is killed,
and its chats' next tokens are waited for. What the other worker has to read for them is their prompts and all that was
said; a new worker starts only after that, so that nobody else computes."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
from pathlib import Path

from tests.faults.test_engine_kills import busiest, loras
from tests.faults.trial import Reading, Trial, ledger_of
from tests.fleets import Fleet, Worker, wait_until
from tests.installed_engine import MODEL, NAME, start, wait_ready
from tests.servers import RedisServer, new_fleet_name, running_server
from tokenfleet.wire.events import Delta

_TOKENS, _LONGEST_S = 600, 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chats", type=int, default=6)
    parser.add_argument("--at", type=int, default=200, help="tokens of each chat before the kill")
    args = parser.parse_args()
    if NAME is None:
        print("neither vllm nor sglang is installed here")
        return 0
    print(f"{NAME}, {MODEL}, float32; Python {platform.python_version()}, {os.cpu_count()} cores, "
          f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}; {args}")  # fmt: skip
    with running_server() as server, tempfile.TemporaryDirectory(prefix="tf-takeovers-") as folder:
        fleet = Fleet(RedisServer(server, new_fleet_name()), Path(folder))
        try:
            _, options = loras(fleet)
            workers = [start(fleet, **options), start(fleet, **options)]
            wait_ready(fleet, *workers)
            stalls, rates = [], []
            for number in range(args.rounds):
                found, read = _round(fleet, number, args.chats, args.at)
                print(f"round {number}: load {os.getloadavg()[0]:.1f}; {len(found)} chats taken over, {read} tokens to "
                      f"read; stalls {', '.join(f'{s:.2f}' for s in found)} s", flush=True)  # fmt: skip
                stalls += found
                rates.append(read / max(found))
                if number + 1 < args.rounds:
                    wait_ready(fleet, start(fleet, **options))
            print(f"stall: median {statistics.median(stalls):.2f} s, longest {max(stalls):.2f} s of {len(stalls)}; "
                  f"{statistics.median(rates):.0f} tokens read a second, notice and hand-over included")  # fmt: skip
        finally:
            fleet.close()
    return 0


def _round(fleet: Fleet, number: int, chats: int, at: int) -> tuple[list[float], int]:
    """The stalls, and what was to be read for them."""
    with Trial(fleet) as trial:
        jobs = [
            trial.submit(
                f"Tell me {number * chats + k} things about rivers.", model=MODEL, adapter=(None, "a", "b")[k % 3],
                do_sample=False, max_new_tokens=_TOKENS, ignore_eos=True,
            )
            for k in range(chats)
        ]  # fmt: skip
        readings = trial.watch(jobs)
        trial.until_streaming(at, timeout_s=300)
        victim = busiest(fleet, trial)
        hit = [reading for reading in readings if _runs_on(fleet, trial, reading, victim)]
        trial.kill(victim)
        victim.wait(30)
        wait_until(lambda: all(reading.takeovers for reading in hit), _LONGEST_S, "all chats go on")
        stalls = sorted(after - before for reading in hit for before, after in reading.takeovers)
        read = sum(int(ledger_of(fleet, each.job)["prompt_tokens"]) + _said_before(each) for each in hit)
        for job in jobs:
            job.cancel()
        trial.until_over()
        return stalls, read


def _said_before(reading: Reading) -> int:
    deltas = [event for event in reading.events if isinstance(event, Delta)]
    last, _ = reading.takeovers[0]
    return sum(len(delta.ids) for delta, t in zip(deltas, reading.delta_times, strict=True) if t <= last)


def _runs_on(fleet: Fleet, trial: Trial, reading: Reading, worker: Worker) -> bool:
    pids = {each["id"]: int(each["pid"]) for each in trial.client.workers()}
    entry = ledger_of(fleet, reading.job)
    return entry["state"] == "running" and pids.get(entry["worker"]) == worker.pid


if __name__ == "__main__":
    raise SystemExit(main())
