"""What the code has, the pages tell of."""

from __future__ import annotations

from pathlib import Path

from tokenfleet.engines.families import FAMILIES, OTHERS, Cell, Given
from tokenfleet.producer.gateway.settings import GatewaySettings
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.support import ENGINES, REFUSED
from tokenfleet.workers.settings import WorkerSettings

DOCS = Path(__file__).parents[2] / "docs"


def test_every_setting_of_a_worker_is_documented() -> None:
    page = (DOCS / "settings.md").read_text()
    assert [n for n in WorkerSettings.model_fields if f"`TOKENFLEET_{n.upper()}`" not in page] == []


def test_every_setting_of_a_gateway_is_documented() -> None:
    page = (DOCS / "settings.md").read_text()
    assert [n for n in GatewaySettings.model_fields if f"`TOKENFLEET_GATEWAY_{n.upper()}`" not in page] == []


def test_every_generation_parameter_is_documented() -> None:
    page = (DOCS / "parameters.md").read_text()
    assert [n for n in GenerationParams.model_fields if f"`{n}`" not in page] == []


def test_the_page_of_parameters_names_who_refuses_which() -> None:
    for line in (DOCS / "parameters.md").read_text().splitlines():
        if line.startswith("| `"):
            _, param, *_, refused_by, _ = line.split("|")
            expected = [
                name + (f" (above {refusal.above:g})" if refusal.above else "")
                for name in ENGINES
                if (refusal := REFUSED[name].get(param.strip(" `")))
            ]
            assert refused_by.strip() == ", ".join(expected), param


def shown(cell: Cell) -> str:
    if not isinstance(cell, Given):
        return f"no: [{cell.reason.rstrip('.')}]({cell.source})"
    parts = [f"{kind}s" for kind in cell.tested] + [f"({kind}s)" for kind in cell.untested]
    return ", ".join(parts)


def test_the_page_of_media_says_what_each_engine_is_given_of_each_family() -> None:
    page = (DOCS / "media.md").read_text()
    for name, family in {**FAMILIES, "others with a processor": OTHERS}.items():
        row = [name, *(shown(family.cell(engine)) for engine in ("transformers", "vllm", "sglang"))]
        assert f"| {' | '.join(row)} |" in page


def test_links_between_pages_lead_somewhere() -> None:
    import re

    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
