"""The contract on a GPU, for each engine that is installed (their pins exclude one another: one environment each)."""

from __future__ import annotations

import importlib.util

import pytest
import pytest_asyncio

from tests.contract.subjects import SUBJECTS

_INSTALLED = [name for name in ("vllm", "sglang") if name in SUBJECTS and importlib.util.find_spec(name)]


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
