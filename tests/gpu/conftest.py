"""The contract on a GPU, for each engine that is installed (their pins exclude one another: one environment each)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import pytest_asyncio

from tests.contract.subjects import SUBJECTS

_INSTALLED = [name for name in ("vllm", "sglang") if name in SUBJECTS and importlib.util.find_spec(name)]


_LIMIT_S = 560
"""Of a test with its fixtures: on a new machine SGLang compiles its kernels for GPTQ for some 290 to 340 s."""


def pytest_collection_modifyitems(items):
    for item in items:
        if not item.path.is_relative_to(Path(__file__).parent):
            continue
        item.add_marker(pytest.mark.timeout(_LIMIT_S), append=False)
        # Of several modules that one here takes its tests from, the last's marks are all that is left: without its
        # own, a test waits in a loop of its own for an engine whose loop stands still.
        home = sys.modules[item.function.__module__]
        if _marks(home) != _marks(item.module):
            raise pytest.UsageError(f"{item.nodeid} has not the marks of {home.__name__}: give it a module of its own.")


def _marks(module):
    """But for the time, which is given here."""
    marks = getattr(module, "pytestmark", [])
    return [mark for mark in (marks if isinstance(marks, list) else [marks]) if mark.name != "timeout"]


@pytest.fixture(scope="session", autouse=True)
def gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=_INSTALLED)
async def subject(request, gpu, tmp_path_factory):
    name = request.param
    async with SUBJECTS[name](tmp_path_factory.mktemp(name)) as subject:
        yield subject
