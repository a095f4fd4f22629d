"""Marks and time limits by folder, so that a test file need not repeat them. Fixtures live beside their tests."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

pytest_plugins = ["tests.servers", "tests.fleets", "tests.local_fleets", "tests.shells"]

_ROOT = Path(__file__).parent

# folder: (marker, seconds a test may take unless it says otherwise). A limit is for hangs, not an assertion of speed.
_FOLDERS = {
    "unit": ("unit", 60),
    "contract": ("contract", 300),
    "integration": ("integration", 180),
    "faults": ("fault", 300),
    "gpu": ("gpu", 600),
    "browser": ("browser", 120),
    "compose": ("compose", 1800),
}
# Files that take longest start first: tests run on several processes, a file on one of them.
_LONGEST = (
    "integration/test_readme.py",
    "integration/test_cli.py",
    "contract/test_transformers.py",
    "faults/test_real_model.py",
    "faults/test_crash_points.py",
    "contract/engine/test_choosing.py",
    "integration/test_local_fleet_users.py",
    "integration/test_local_fleet_deaths.py",
    "unit/test_ledger_stateful.py",
)


def pytest_configure() -> None:
    # A shell starts background jobs with these ignored, and children inherit that: Ctrl-C could not be tested then.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in (signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(name) == signal.SIG_IGN:
            signal.signal(name, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(_ROOT):
            continue
        folder = item.path.relative_to(_ROOT).parts[0]
        if folder in _FOLDERS:
            marker, limit_s = _FOLDERS[folder]
            item.add_marker(marker)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(limit_s))
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> int:
    name = item.path.relative_to(_ROOT).as_posix() if item.path.is_relative_to(_ROOT) else ""
    return _LONGEST.index(name) if name in _LONGEST else len(_LONGEST)
