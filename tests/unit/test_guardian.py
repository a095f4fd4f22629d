"""How the guardian finds what its worker has started. What it does with that: tests/faults/test_takeover.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tokenfleet.workers.guardian import _descendants

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")


def test_a_process_that_ends_while_it_looks_is_no_error() -> None:
    """With an error it would leave what the worker had started, and its jobs to the lease."""
    with subprocess.Popen(["sh", "-c", "sleep 60 & echo; wait"], stdout=subprocess.PIPE) as shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        [child] = _descendants(shell.pid)
        subprocess.run(["kill", "-9", str(shell.pid), str(child)], check=True)
    assert _descendants(shell.pid) == []
