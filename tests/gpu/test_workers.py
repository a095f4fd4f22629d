"""Real workers on a GPU: an answer, a death while nothing runs, kills under load; and the card's memory afterwards."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.faults.test_engine_kills import *  # noqa: F403
from tests.integration.test_engine_worker import *  # noqa: F403
from tests.processes import wait_until

_LEFT_MIB = 64
"""What may be left of a card's memory: other readings of the same differ by a little."""


def used_mib() -> int:
    """Of all cards shown to us, by the driver, whoever holds it."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if shown := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={shown}")
    return sum(map(int, subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()))


@pytest.fixture(autouse=True)
def memory_is_given_back(fleet):
    """Ten seconds after the last kill at most; what a test leaves running is ended first."""
    before = used_mib()
    yield
    fleet.close_workers()
    wait_until(lambda: used_mib() <= before + _LEFT_MIB, 10, f"the card's memory is {used_mib()} MiB, was {before}")
