"""One engine for all modules of this folder, each test once with every engine.

``TOKENFLEET_CONTRACT_ENGINES=vllm`` (names of `SUBJECTS`, separated by commas) takes others than the default two."""

from __future__ import annotations

import os

import pytest_asyncio

from tests.contract.subjects import SUBJECTS

_NAMES = os.environ.get("TOKENFLEET_CONTRACT_ENGINES", "scripted,transformers").split(",")


# Of the package: it ends with the last test here, so that no other suite runs beside it.
@pytest_asyncio.fixture(scope="package", loop_scope="session", params=_NAMES)
async def subject(request, tmp_path_factory):
    name = request.param
    async with SUBJECTS[name](tmp_path_factory.mktemp(name)) as subject:
        yield subject
