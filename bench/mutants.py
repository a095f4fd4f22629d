"""Does the suite notice? ``python -m bench.mutants [NAME…] [--results FILE] [--write]``.

Each mutant is the product with one promise broken, by a patch of text, in a copy of the tree in a temporary folder.
A few tests are run against it there: at least one must fail. ``--write`` puts the outcome into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- mutants: written by bench/mutants.py -->", "<!-- end of mutants -->"
STATEFUL = "tests/unit/test_ledger_stateful.py"


@dataclass(frozen=True)
class Mutant:
    """``old`` stands in ``file`` exactly once."""

    name: str
    promise: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def faults(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/faults/test_{name}" for name in names)


MUTANTS = [
    Mutant(
        "no-epoch-check", "writes are fenced by epoch and owner", "wire/lua/append.lua",
        "elseif f[1] ~= 'running' or f[2] ~= epoch or f[3] ~= owner then", "elseif f[1] ~= 'running' then",
        (*faults("fencing.py::test_a_worker_cut_off_from_redis_is_fenced_when_it_is_back"), STATEFUL),
    ),
    Mutant(
        "publish-before-append", "durable first, live second", "wire/lua/append.lua",
        "    local fresh = {}\n",
        "    local fresh = {}\n"
        "    publish(id, first, table.concat(ARGV, ',', events, events + upto - first))\n",
        (STATEFUL,),
    ),
    Mutant(
        "no-dedupe", "a retried batch whose reply was lost is written once", "wire/lua/append.lua",
        "for s = seq + 1, upto do", "for s = first, upto do",
        faults("fencing.py::test_lost_replies_and_short_cuts_are_no_fence"),
    ),
    Mutant(
        "cursor-off-by-one", "a reader's cursor points behind what it has", "producer/collector.py",
        "for event in events[expected - seq :]:", "for event in events[max(0, expected - seq - 1) :]:",
        faults("readers.py::test_connections_killed_every_200_ms"),
    ),
    Mutant(
        "gap-not-filled", "gaps of the channel are filled from the log", "producer/collector.py",
        "self._read_log = True  # a gap: the log has what is missing",
        "expected = seq  # go on behind it\n                    continue",
        faults("readers.py::test_dropped_messages_are_read_from_the_log_at_once"),
    ),
    Mutant(
        "silent-jobs-not-asked-for", "a lost last message hangs no reader", "producer/collector.py",
        "polled = await self._ledger.poll(silent)", "polled = []; silent = []",
        faults("readers.py::test_a_dropped_last_message_hangs_nobody"),
    ),
    Mutant(
        "strike-not-counted", "three strikes end a poison job", "wire/lua/common.lua",
        "elseif f[4] ~= f[1] then strikes = strikes + 1 end", "end",
        faults("poison.py::test_an_engine_that_dies_under_a_job_is_a_strike_too"),
    ),
    Mutant(
        "waiting-is-a-strike", "who waits to run alone takes no strike", "wire/lua/common.lua",
        "elseif f[4] ~= f[1] then strikes = strikes + 1 end", "else strikes = strikes + 1 end",
        (f"{STATEFUL}::test_who_waits_to_run_alone_takes_no_strike",),
    ),
    Mutant(
        "starts-over", "a takeover continues from what was delivered", "workers/served.py",
        "for index, choice in delivered.choices.items()", "for index, choice in ()",
        faults("continuations.py::test_kinds_of_events_after_a_takeover"),
    ),
    Mutant(
        "terminal-twice", "one terminal event, last", "wire/lua/cancel.lua",
        "if has_ended(state) then return { 'ended', state } end\n", "",
        (*faults("endings.py::test_cancel_against_finish_gives_one_end"), STATEFUL),
    ),
    Mutant(
        "outage-lapses-leases", "time in which Redis was away counts for nobody", "wire/lua/reap.lua",
        "if last > 0 and NOW - last > normal_gap then", "if false then",
        (*faults("redis_outages.py::test_redis_away_for_ten_seconds_under_64_streams"), STATEFUL),
    ),
    Mutant(
        "leases-never-lapse", "a dead or frozen worker's jobs go to others", "wire/lua/reap.lua",
        "local r, p = bury(wid)", "local r, p = 0, 0",
        faults("fencing.py::test_a_frozen_worker_that_comes_back_is_fenced"),
    ),
    Mutant(
        "orphans-left", "ten seconds later nothing of a dead worker is left", "workers/guardian.py",
        "    watch.kill_what_is_left()  # first", "    pass  # first",
        faults("engine_faults.py::test_ten_seconds_later_nothing_of_a_dead_worker_is_left"),
    ),
    Mutant(
        "lost-by-age", "a backlog is no loss", "wire/lua/reap.lua",
        "local lost = empty and (NOW - sent", "local lost = (NOW - sent",
        faults("overload.py::test_a_backlog_of_10000_is_no_loss"),
    ),
    Mutant(
        "lost-never-found", "a lost message is sent again", "wire/lua/reap.lua",
        "          if lost then\n", "          if false then\n",
        faults("takeover.py::test_a_lost_celery_message_is_found"),
    ),
    Mutant(
        "lost-with-its-worker", "a dead worker's messages are sent again sooner", "wire/lua/reap.lua",
        "or sent <= buried and NOW - buried >= ORPHAN_MS", "", (STATEFUL,),
    ),
    Mutant(
        "zombie-goes-on", "a fenced attempt stops and frees its slot", "workers/publisher.py",
        "            self._on_lost(status)\n", "",
        faults("fencing.py::test_a_frozen_worker_that_comes_back_is_fenced"),
    ),
    Mutant(
        "leaving-cancels", "a shutdown hands over, it does not cancel", "workers/runtime.py",
        "            await asyncio.gather(*map(self._release, attempts))\n",
        "            for attempt in attempts:\n                await self.ledger.cancel(attempt.claim.job_id)\n",
        faults("drain.py::test_a_second_signal_hands_over_immediately"),
    ),
    Mutant(
        "leaving-is-a-death", "a shutdown costs a job no strike", "workers/runtime.py",
        "        async with self._handing_over:\n", "        if True:\n",
        faults("drain.py::test_after_the_grace_period_jobs_are_handed_over_at_once"),
    ),
    Mutant(
        "handover-is-a-strike", "a shutdown costs a job no strike", "wire/lua/release.lua",
        "if ARGV[5] == 'died' then", "if true then", (STATEFUL,),
    ),
    Mutant(
        "hang-not-noticed", "a hung engine loses its lease", "workers/health.py",
        "return self._stood_s <", "return True or self._stood_s <",
        faults("engine_faults.py::test_a_hung_engine_loses_its_lease_by_decision"),
    ),
    Mutant(
        "no-expiry", "nothing is left after retention", "wire/lua/common.lua",
        "  redis.call('PEXPIRE', log_key(id), keep)\n", "",
        (STATEFUL,),
    ),
    Mutant(
        "cut-log-goes-on", "never other text for a delivered index", "wire/lua/append.lua",
        "elseif first > num(f[4]) + 1 then", "elseif false then",
        (*faults("redis_outages.py::test_a_log_cut_behind_a_reader_ends_with_lost_state"), STATEFUL),
    ),
    Mutant(
        "grown-again-unseen", "never other text for a delivered index", "producer/collector.py",
        "if overlap and events and events[0] != (self.cursor, self._last):", "if False:",
        faults("redis_outages.py::test_a_reader_that_was_away_while_a_shorter_log_grew_again"),
    ),
    Mutant(
        "replicas-not-waited-for", "with replicas=1 a failover loses nothing that was seen", "wire/scripts.py",
        'pipe.execute_command(*command, 0, *args).execute_command("WAIT", replicas, timeout_ms)',
        'pipe.execute_command(*command, 0, *args).execute_command("WAIT", 0, timeout_ms)',
        faults("failover.py::test_with_replicas_waited_for_a_failover_loses_nothing"),
    ),
    Mutant(
        "running-jobs-have-no-deadline", "a total deadline ends a running job, whatever its worker does",
        "wire/lua/claim.lua",
        "redis.call('ZADD', P .. 'deadlines', num(f[6]), id)", "redis.call('ZREM', P .. 'deadlines', id)",
        faults("endings.py::test_a_total_deadline_ends_a_running_job_and_one_whose_worker_is_dead"),
    ),
    Mutant(
        "runs-expired-jobs", "what is past its time-to-live never runs", "wire/lua/claim.lua",
        "if f[1] == 'queued' and due and num(due) <= NOW then", "if false then",
        (f"{STATEFUL}::test_what_waited_too_long_expires_when_it_is_claimed",),
    ),
]  # fmt: skip


def run(mutant: Mutant, limit_s: float) -> str:
    """``killed by TEST``, or ``SURVIVED``."""
    with tempfile.TemporaryDirectory(prefix="tf-mutant-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".*", "*.egg-info", "__pycache__"))
        file = tree / mutant.file
        text = file.read_text()
        if text.count(mutant.old) != 1:
            return f"STALE: its text stands {text.count(mutant.old)} times in {mutant.file}"
        file.write_text(text.replace(mutant.old, mutant.new))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-rf",
            "--no-header",
            "-p",
            "no:cacheprovider",
            *mutant.tests,
        ]
        try:
            done = subprocess.run(
                command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True,
                timeout=limit_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "killed (the tests did not end)"
        if done.returncode == 0:
            return "SURVIVED"
        failed = [
            line.split(" - ")[0].split("::")[-1] for line in done.stdout.splitlines() if line.startswith("FAILED")
        ]
        if done.returncode != 1 or not failed:
            return f"ERROR: {done.stdout[-300:]} {done.stderr[-300:]}"
        return f"killed by `{failed[0]}`"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--results", type=Path, help="keep outcomes in this file, and write all that it has")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    outcomes: dict[str, str] = {}
    if args.results and args.results.exists():
        outcomes = json.loads(args.results.read_text())
    for mutant in MUTANTS:
        if (args.names and mutant.name not in args.names) or (not args.names and mutant.name in outcomes):
            continue
        started = time.monotonic()
        outcomes[mutant.name] = outcome = run(mutant, 400)
        if args.results:
            args.results.write_text(json.dumps(outcomes, indent=1))
        print(f"{mutant.name}: {outcome} ({time.monotonic() - started:.0f} s)", flush=True)
    killed = sum(outcome.startswith("killed") for outcome in outcomes.values())
    print(f"{killed} of {len(outcomes)} mutants killed")
    if args.write:
        write(outcomes)
    return 0 if killed == len(outcomes) else 1


def write(outcomes: dict[str, str]) -> None:
    tried = [mutant for mutant in MUTANTS if mutant.name in outcomes]
    rows = "\n".join(f"| `{mutant.name}` | {mutant.promise} | {outcomes[mutant.name]} |" for mutant in tried)
    body = f"{BEGIN}\n| mutant | the promise it breaks | outcome |\n|---|---|---|\n{rows}\n{END}"
    text = DOCUMENT.read_text()
    if BEGIN in text:
        head, _, rest = text.partition(BEGIN)
        DOCUMENT.write_text(head + body + rest.partition(END)[2])
    else:
        DOCUMENT.write_text(f"{text.rstrip()}\n\n## Mutants\n\n{body}\n")


if __name__ == "__main__":
    raise SystemExit(main())
