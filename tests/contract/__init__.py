"""The engines under contract, and what holds of one of them alone."""

import pytest

pytest.register_assert_rewrite("tests.contract.engine.asking", "tests.contract.transformers_runs")
