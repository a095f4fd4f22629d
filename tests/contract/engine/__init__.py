"""The contract of all engines: one suite, each test with every engine."""

import pytest

pytest.register_assert_rewrite("tests.contract.engine.asking")
