"""The checker itself: a good run passes, and each way in which one can be bad is found."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.bad_runs import FAULTY, an_accepted_job_is_gone
from tests.faults.checker import Evidence, check
from tests.faults.honest_run import A, Run, good_run


def test_a_good_run_passes() -> None:
    verdict = check(good_run(), in_flight_tokens=3)
    assert verdict.is_clean, verdict.violations or verdict.invalid
    assert verdict.jobs == 2
    assert verdict.cut_streams == 2
    assert verdict.tokens == 25 + 26


@pytest.mark.parametrize("bend", FAULTY, ids=lambda bend: bend.__name__)
def test_a_bad_run_is_found(bend: Callable[[Evidence], str]) -> None:
    evidence = good_run()
    code = bend(evidence)
    assert code in check(evidence, in_flight_tokens=3).codes


def test_there_are_enough_ways_to_be_bad() -> None:
    assert len(FAULTY) >= 30


def test_a_run_whose_kill_landed_nowhere_is_invalid() -> None:
    run = Run()
    run.job(A, [20])
    run.note("fault", what="SIGKILL", pid=1, cuts=True)
    assert check(run.evidence).invalid
    assert not check(run.evidence).violations


def test_the_command_line_reads_a_folder_and_ends_nonzero_for_a_bad_one(tmp_path: Path) -> None:
    def judge(evidence: Evidence) -> subprocess.CompletedProcess[str]:
        (tmp_path / "history-1.jsonl").write_text("".join(json.dumps(x) + "\n" for x in evidence.history) + '{"cut')
        (tmp_path / "record-1.jsonl").write_text("".join(json.dumps(x) + "\n" for x in evidence.records))
        (tmp_path / "dump.json").write_text(json.dumps(evidence.dump))
        command = [sys.executable, "-m", "tests.faults.checker", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    good = judge(good_run())
    assert good.returncode == 0, good.stdout + good.stderr
    evidence = good_run()
    an_accepted_job_is_gone(evidence)
    bad = judge(evidence)
    assert bad.returncode == 1
    assert "job_lost" in bad.stdout


def test_the_checker_shares_no_code_with_the_product() -> None:
    for path in (Path(__file__).parent / "checker").glob("*.py"):
        assert "tokenfleet" not in path.read_text()
