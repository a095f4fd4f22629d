"""The command line as a process, for tests: on a fleet of the test's, or on local fleets of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleets import ROOT, Fleet

TOKENFLEET = (sys.executable, "-m", "tokenfleet")
SCRIPTED = ("--infer_backend", "scripted", "--engine_args", "{token_ms: 5}")
_OURS = ("TOKENFLEET_", "XDG_")


def environment(**more: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    return {**plain, "PYTHONPATH": str(ROOT), **more}


class Shell:
    """Runs tokenfleet with one environment."""

    def __init__(self, **env: str) -> None:
        self.env = environment(**env)

    def __call__(self, *words: str, stdin: str = "", status: int = 0, timeout_s: float = 90.0) -> str:
        """Its stdout; fails unless it exits with ``status``."""
        return self.run(*words, stdin=stdin, status=status, timeout_s=timeout_s).stdout

    def run(
        self, *words: str, stdin: str = "", status: int = 0, timeout_s: float = 90.0
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*TOKENFLEET, *words], input=stdin, env=self.env, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == status, f"{words}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def error(self, *words: str, stdin: str = "", status: int = 2) -> str:
        """Its error: one line, no result, no traceback."""
        done = self.run(*words, stdin=stdin, status=status)
        assert done.stdout == ""
        line = done.stderr.splitlines()[-1]
        assert line.startswith("error [")
        assert "Traceback" not in done.stderr
        return line


@pytest.fixture
def shell(served: Fleet) -> Shell:
    return Shell(TOKENFLEET_REDIS_URL=served.redis.url, TOKENFLEET_FLEET=served.redis.fleet)


@pytest.fixture
def local_shell() -> Iterator[Shell]:
    """No Redis URL: local fleets, in folders of the test's own."""
    with tempfile.TemporaryDirectory(prefix="tf-") as folder:
        for name in ("run", "state"):
            Path(folder, name).mkdir()
        # The cache is the user's own: it may hold the small model.
        shell = Shell(XDG_RUNTIME_DIR=f"{folder}/run", XDG_STATE_HOME=f"{folder}/state")
        yield shell
        shell("down")
