"""What the code has, the pages tell of."""

from __future__ import annotations

from pathlib import Path

from tokenfleet.wire.chat import GenerationParams
from tokenfleet.workers.settings import WorkerSettings

DOCS = Path(__file__).parents[2] / "docs"


def test_every_setting_of_a_worker_is_documented() -> None:
    page = (DOCS / "settings.md").read_text()
    assert [n for n in WorkerSettings.model_fields if f"`TOKENFLEET_{n.upper()}`" not in page] == []


def test_every_generation_parameter_is_documented() -> None:
    page = (DOCS / "parameters.md").read_text()
    assert [n for n in GenerationParams.model_fields if f"`{n}`" not in page] == []


def test_links_between_pages_lead_somewhere() -> None:
    import re

    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
