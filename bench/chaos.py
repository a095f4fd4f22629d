"""The long run of kills and outages: ``python -m bench.chaos``; ``--write`` puts the figures into docs/reliability.md.

Real processes (Valkey, Celery workers with the salted scripted engine), real signals; every client's history, a dump of
Redis and the engines' own records go to tests/faults/checker, which shares no code with the product. By default a
moderate run (some ten minutes on two cores); ``--full``: 200 streams x 20 kills x 3 seeds, and 50,000 jobs for leaks.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from bench.chaos_failover import crash_points, wait_cost
from bench.chaos_flood import flood
from bench.chaos_leaks import leak_run
from bench.chaos_redis import failover, failover_wait, redis_away, redis_empty, redis_restarts
from bench.chaos_report import Row, keep, kept, percentile, write_table
from bench.chaos_run import Scale
from bench.chaos_workers import cancels, kills, lease_kills, rolling, zombies

DOCUMENT = Path(__file__).parent.parent / "docs" / "reliability.md"

TRIALS: dict[str, Callable[[Scale, int], Row]] = {
    f.__name__: f
    for f in (
        kills,
        lease_kills,
        zombies,
        rolling,
        redis_restarts,
        redis_away,
        redis_empty,
        failover,
        failover_wait,
        cancels,
        flood,
    )
}
TEXTS: dict[str, Callable[[Scale], str]] = {
    "wait_cost": lambda scale: wait_cost(),
    "crash_points": lambda scale: crash_points(),
    "leaks": lambda scale: leak_run(scale.leak_jobs),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="*", choices=[*TRIALS, *TEXTS, []], help="all unless named")
    parser.add_argument("--full", action="store_true", help="200 streams x 20 kills x 3 seeds, 50,000 jobs for leaks")
    parser.add_argument("--quick", action="store_true", help="a few minutes")
    parser.add_argument("--seed", type=int, action="append", help="these seeds only")
    parser.add_argument("--results", type=Path, help="keep rows in this file, and write all that it has")
    parser.add_argument("--render", action="store_true", help="run nothing: only write what --results has")
    parser.add_argument("--keep", type=Path, help="let the evidence of each trial stay in this folder")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/reliability.md")
    args = parser.parse_args()
    scale = Scale()
    if args.full:
        scale = Scale(streams=200, kills=20, seeds=(1, 2, 3), token_ms=100.0, tokens=1500, flood=10_000,
                      leak_jobs=50_000, outages=5)  # fmt: skip
    elif args.quick:
        scale = Scale(streams=16, kills=3, seeds=(1,), flood=500, leak_jobs=2000, outages=1, tokens=500)
    scale.keep = args.keep
    wanted = [] if args.render else args.trials or [*TRIALS, *TEXTS]
    size = " --full" if args.full else " --quick" if args.quick else ""
    seeds = tuple(args.seed) if args.seed else scale.seeds
    rows, texts = kept(args.results) if args.results else ([], [])
    violations = 0
    for name in wanted:
        if name in TEXTS:
            texts.append(TEXTS[name](scale))
            print(texts[-1], flush=True)
            if args.results:
                keep(args.results, texts[-1])
            continue
        for seed in seeds:
            started = time.monotonic()
            row = TRIALS[name](scale, seed)
            row.command = f"python -m bench.chaos {name}{size}"
            rows.append(row)
            violations += row.violations
            if args.results:
                keep(args.results, row)
            print(f"{row.line()}  (seed {seed}, {time.monotonic() - started:.0f} s)", flush=True)
    stalls = [s for row in rows for s in row.stalls_s]
    if stalls:
        print(f"all stalls: n {len(stalls)}, p50 {statistics.median(stalls):.2f} s, p99 {percentile(stalls, 99):.2f} s")
    if args.write or args.render:
        machine = f"{time.strftime('%Y-%m-%d', time.gmtime())}, {psutil.cpu_count()} shared cores, "
        write_table(DOCUMENT, rows, texts, machine + f"Python {platform.python_version()}")
    return 1 if violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
