"""Every engine that needs a GPU keeps the contract on one: the same tests, with the engines of this folder."""

from __future__ import annotations

from tests.contract.test_engine_contract import *  # noqa: F403
