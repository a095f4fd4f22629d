"""The reference vectors (LLaMA-Factory 0.9.5), which lie beside the repository, and tokenizers to render with."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[2] / "shared" / "vectors" / "llamafactory_templates.json"
is_absent = pytest.mark.skipif(not FILE.is_file(), reason="the vectors lie beside the repository: ../shared/vectors")


@cache
def load() -> dict[str, Any]:
    if not FILE.is_file():
        return {
            "cases": [],
            "tool_extract": [],
            "templates": {},
            "parsed_templates": {},
            "synthetic_chat_templates": {},
        }
    return json.loads(FILE.read_text(encoding="utf-8"))


class Characters:
    """A tokenizer with a token per character, and the words given as special tokens."""

    chat_template: Any = None
    bos_token, eos_token = "<s>", "</s>"

    def __init__(self, words: Iterable[str] = ()) -> None:
        self.words = ["<s>", "</s>", *words]

    bos_token_id = 0x110000
    eos_token_id = 0x110001

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return {"bos_token": "<s>", "eos_token": "</s>"}

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        class Added:
            special = True

            def __init__(self, content: str) -> None:
                self.content = content

        return {0x110000 + i: Added(word) for i, word in enumerate(self.words)}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = []
        while text:
            word = next((word for word in self.words if text.startswith(word)), text[0])
            ids.append(0x110000 + self.words.index(word) if word in self.words else ord(word))
            text = text[len(word) :]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.convert_ids_to_tokens(token) for token in ids)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return 0x110000 + self.words.index(token) if token in self.words else ord(token) if len(token) == 1 else None

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.words[token - 0x110000] if token >= 0x110000 else chr(token)

    def __len__(self) -> int:
        return 0x110000 + len(self.words)


@cache
def _smollm2() -> Any:
    pytest.importorskip("transformers", reason="comes with an engine's extra")
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache_folder / "tokenfleet" / "models" / "smollm2-135m-instruct"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("SmolLM2's tokenizer is not on this machine yet: run `tokenfleet chat` or the demo once")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@cache
def smollm2(added: tuple[str, ...] = (), chat_template: str | None = None, *, adds_bos: bool = False) -> Any:
    """SmolLM2's own tokenizer, for all tests. ``added``: what LLaMA-Factory would have made up for stop words."""
    tokenizer = copy.deepcopy(_smollm2())
    if added:
        tokenizer.add_special_tokens({"additional_special_tokens": list(added)}, replace_extra_special_tokens=False)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{bos[0]} $A", special_tokens=[bos])
    return tokenizer
