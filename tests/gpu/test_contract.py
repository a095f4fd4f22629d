"""Every engine that needs a GPU keeps the contract on one: the same tests, with the engines of this folder."""

from __future__ import annotations

from tests.contract.engine.test_choosing import *  # noqa: F403
from tests.contract.engine.test_continuation import *  # noqa: F403
from tests.contract.engine.test_ends import *  # noqa: F403
from tests.contract.engine.test_forms import *  # noqa: F403
from tests.contract.engine.test_load import *  # noqa: F403
from tests.contract.engine.test_logprobs import *  # noqa: F403
from tests.contract.engine.test_table import *  # noqa: F403
