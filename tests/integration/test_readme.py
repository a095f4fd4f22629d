"""The README's two commands and its examples, as they stand there, on a copy that has nothing: no environment, no
cache, no fleet."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What one checkout makes and another must not inherit.
LEFTOVERS = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis", ".coverage*", "build", "*.egg-info"
)


def two_commands() -> list[str]:
    section = (ROOT / "README.md").read_text().split("## Two commands", 1)[1]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block
    return [line.split("#")[0].strip() for line in block[1].splitlines() if line.strip()]


class Checkout:
    """A clean copy; ``run`` gives its commands an environment of their own, and this machine's package index."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder = folder
        mine = ("COV", "MAKE", "MFLAGS", "PYTEST", "PYTHON", "SUITES", "TOKENFLEET_", "VENV", "VIRTUAL_ENV", "XDG_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
        self.env = {
            **kept,
            "PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR", str(Path("~/.cache/pip").expanduser())),
            "XDG_CACHE_HOME": str(scratch / "cache"),
            "XDG_RUNTIME_DIR": str(scratch / "run"),
            "XDG_STATE_HOME": str(scratch / "state"),
        }
        (scratch / "run").mkdir(mode=0o700)

    def run(self, command: str, limit_s: float, text: str | None = None, **env: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env={**self.env, **env},
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit_s,
        )
        assert done.returncode == 0, f"{command!r} ended with {done.returncode}:\n{done.stdout[-6000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def checkout() -> Iterator[Checkout]:
    # Not under pytest's folder: a unix socket's path may have 107 characters.
    scratch = Path(tempfile.mkdtemp(prefix="tf-"))
    try:
        shutil.copytree(ROOT, scratch / "copy", symlinks=True, ignore=LEFTOVERS)
        checkout = Checkout(scratch / "copy", scratch)
        try:
            yield checkout
        finally:
            checkout.run("test ! -x .venv/bin/tokenfleet || .venv/bin/tokenfleet down || true", limit_s=150)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_first_command_sets_up_and_runs_the_main_job(checkout: Checkout) -> None:
    output = checkout.run(two_commands()[0], limit_s=1400)
    assert "Paris" in output
    # ... and the fleet it started answers the chat that the README tells of next.
    assert "Paris" in checkout.run(
        ".venv/bin/tokenfleet chat --temperature 0", limit_s=150, text="What is the capital of France?\n"
    )


def python_examples() -> list[str]:
    """All but the one of OpenAI's API, which test_gateway_real_model.py runs."""
    text = (ROOT / "README.md").read_text().split("## OpenAI's API", 1)[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_python_examples_run_as_they_stand(checkout: Checkout) -> None:
    """On the fleet of the first command; the first example starts a private one of its own."""
    examples = python_examples()
    assert len(examples) >= 5
    url = checkout.run(".venv/bin/tokenfleet status --url", limit_s=150).strip()
    outputs = [
        checkout.run(".venv/bin/python -W error -", limit_s=300, text=example, TOKENFLEET_REDIS_URL=url)
        for example in examples
    ]
    assert "The capital of France is Paris." in outputs[0]
    assert all(output.strip() for output in outputs)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_second_command_sets_up_and_passes_the_tests(checkout: Checkout) -> None:
    # The command itself, on few of its tests: this one is among the rest.
    output = checkout.run(two_commands()[1], limit_s=840, SUITES="tests/unit/test_docs.py tests/unit/test_urls.py")
    assert re.search(r"\d+ passed", output.splitlines()[-1]), output[-2000:]
