"""The table of engines and families of models."""

from __future__ import annotations

import pytest

from tokenfleet.engines.families import FAMILIES, KINDS, OTHERS, Given, cell_of, kinds_given
from tokenfleet.wire.support import Refusal

ENGINES = ("transformers", "vllm", "sglang")


def test_no_architecture_is_of_two_families_and_every_refusal_has_a_link() -> None:
    names = [name for family in FAMILIES.values() for name in family.architectures]
    assert len(names) == len(set(names))
    for family in (*FAMILIES.values(), OTHERS):
        for cell in map(family.cell, ENGINES):
            if isinstance(cell, Refusal):
                assert cell.source.startswith("https://")
            else:
                kinds = (*cell.tested, *cell.untested)
                assert kinds
                assert sorted(kinds, key=KINDS.index) == list(kinds)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_given_what_the_table_and_the_processor_have(engine: str) -> None:
    assert kinds_given(engine, ["LlavaForConditionalGeneration"], ["image", "video"]) == ("image",)
    assert kinds_given(engine, ["Qwen2VLForConditionalGeneration"], ["image"]) == ("image",)
    assert kinds_given(engine, ["Qwen2AudioForConditionalGeneration"], ["audio"]) == ("audio",)
    others = kinds_given(engine, ["SomethingNewForConditionalGeneration"], KINDS)
    assert others == (KINDS if isinstance(OTHERS.cell(engine), Given) else ())


def test_sglang_says_of_each_family_why_not() -> None:
    mllama, unknown = (cell_of("sglang", [name]) for name in ("MllamaForConditionalGeneration", "New"))
    assert isinstance(mllama, Refusal)
    assert isinstance(unknown, Refusal)
    assert mllama != unknown
