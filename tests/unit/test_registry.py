"""What is asked of an engine wrongly is said before its packages, which take many seconds, are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOAD = """
import asyncio, sys
from tokenfleet.engines.registry import ModelSettings, load
from tokenfleet.wire.errors import TokenfleetError
engine, model, template = sys.argv[1:]
try:
    asyncio.run(load(engine, {"model_name_or_path": model}, ModelSettings("m", template=template or None)))
except TokenfleetError as error:
    print(type(error).__name__, error.code, *sorted({"torch", "transformers"} & set(sys.modules)), error, sep="|")
"""


def load(*args: str, folder: Path | None = None) -> list[str]:
    """Class, code and text of the error, and between them which heavy packages were imported."""
    env = {**os.environ, **({"PYTHONPATH": str(folder)} if folder else {})}
    command = [sys.executable, "-c", LOAD, *args]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|")


@pytest.fixture
def shells(tmp_path: Path) -> Path:
    """Where Python finds packages called as the engines, none of which can be imported."""
    for name, line in {"vllm": "raise RuntimeError('operator nms does not exist')", "transformers": "1 / 0"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(line)
    return tmp_path


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_model_that_is_not_there_is_told_before_anything_heavy_is_imported(engine: str, shells: Path) -> None:
    assert load(engine, "/nowhere/model", "", folder=shells)[:2] == ["UnknownModel", "model_not_found"]


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_template_that_is_not_there_is_told_before_anything_heavy_is_imported(engine: str, shells: Path) -> None:
    kind, code, said = load(engine, str(shells), "qwen33", folder=shells)
    assert (kind, code) == ("ConfigurationError", "configuration_error")
    assert "There is no chat template called 'qwen33'. Did you mean qwen3" in said


def test_packages_that_are_there_but_fail_are_told_as_such(shells: Path) -> None:
    kind, code, said = load("vllm", str(shells), "", folder=shells)
    assert (kind, code) == ("ConfigurationError", "missing_extra")
    assert said.startswith("The engine needs vllm, whose import fails: operator nms does not exist Install it")


def test_an_engine_that_is_not_installed_is_told_with_what_to_install() -> None:
    kind, code, said = load("sglang", "/nowhere/model", "")
    assert (kind, code) == ("ConfigurationError", "missing_extra")
    assert said == "The engine sglang is not installed here. Install it: pip install 'tokenfleet[sglang]'"
