"""``python deploy/constraints/lock.py``: lock.txt, made of what is installed here. `make lock` writes it."""

from __future__ import annotations

import datetime as dt
import platform
from importlib.metadata import Distribution, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOOLS = {"setuptools"}  # a build takes the newest: environments come with one of their own


def requirements(dist: Distribution, extras: frozenset[str]) -> list[Requirement]:
    """What ``dist[extras]`` requires on this machine."""
    found = [Requirement(text) for text in dist.requires or ()]
    return [r for r in found if not r.marker or any(r.marker.evaluate({"extra": e}) for e in (extras or {""}))]


def closure(*extras: str) -> dict[str, Distribution]:
    """Every distribution that ``tokenfleet[extras]`` needs here, by canonical name; itself not included."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [("tokenfleet", frozenset(extras))]
    while todo:
        if (key := todo.pop()) in seen:
            continue
        seen.add(key)
        found[key[0]] = distribution(key[0])
        todo += [(canonicalize_name(r.name), frozenset(r.extras)) for r in requirements(found[key[0]], key[1])]
    del found["tokenfleet"]
    return found


def pins(*extras: str) -> list[str]:
    """``name==version`` of each. A local build counts as its release: 2.13.0+cpu satisfies 2.13.0."""
    return sorted(f"{n}=={d.version.split('+')[0]}" for n, d in closure(*extras).items() if n not in TOOLS)


if __name__ == "__main__":
    where = f"Python {platform.python_version_tuple()[0]}.{platform.python_version_tuple()[1]} on {platform.system()}"
    print(f"# Every package of tokenfleet[all,dev] as tested: {where} {platform.machine()}, {dt.date.today()}.")  # noqa: DTZ011
    print("# A constraints file: pip install -c deploy/constraints/lock.txt -e '.[all,dev]'. Renewed by `make lock`.")
    print("\n".join(pins("all", "dev")))
