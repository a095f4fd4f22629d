"""What a chat template is, and the named ones, read from ``data/*.toml``.

A table there is one template. Texts are Jinja, a list of them where the parts are tokenised apart (token ids depend on
these borders): a string, or a special token: ``{ slot = "bos" }``, ``{ slot = "eos" }``, ``{ token = "<|user|>" }``.

    user, assistant, system   a turn; ``content`` is its text. ``user`` ends with the assistant's header
    tool                      tools' results (else as ``user``): ``results``, and ``content``: all, a line each
    call                      an assistant's tool calls (else as ``assistant``); prefix: before everything
    default_system            used where a request brings none
    system_in_user            the system text goes into the first user's turn
    stop                      words that end an answer; ``replaces_eos``: the first stands for the tokenizer's EOS
    tools                     name of the tool format in ``data/tools.toml``, "default" unless given
    reasoning, thoughts       an answer begins with thoughts, between these two marks; ``empty_thought``: how none are
                              written, with "both" marks or only the one that closes
    call_words                marks around a call in a ``function`` message's text
    media                     tokens that stand for an image, video or audio, and the processor that knows them
    like                      another table, whose entries hold here too. A table named _x is only for this
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from tokenfleet.wire.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Slot:
    """A special token: the tokenizer's own BOS or EOS, or the one called ``token``."""

    kind: Literal["bos", "eos", "token"]
    token: str = ""


Part = str | Slot
_CONTENT: tuple[Part, ...] = ("{{ content }}",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """See the module's docstring for the fields; texts are Jinja sources."""

    name: str
    user: tuple[Part, ...] = _CONTENT
    assistant: tuple[Part, ...] = (*_CONTENT, Slot("eos"))
    system: tuple[Part, ...] = _CONTENT
    tool: tuple[Part, ...]
    call: tuple[Part, ...]
    prefix: tuple[Part, ...] = ()
    default_system: str = ""
    is_system_in_user: bool = False
    stop_words: tuple[str, ...] = ()
    replaces_eos: bool = False
    tool_format: str = "default"
    is_reasoning: bool = False
    thoughts: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    empty_thought: Literal["both", "close"] = "both"
    call_words: tuple[str, str] = ("<tool_call>", "</tool_call>")
    media: Mapping[str, str] = field(default_factory=dict)

    @property
    def no_thoughts(self) -> str:
        """What an answer without thoughts begins with."""
        return self.thoughts[1] if self.empty_thought == "close" else "".join(self.thoughts)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How tools are described and calls are written; Jinja sources. The data file says more.

    ``needs_object``: only JSON objects can be arguments."""

    name: str
    definitions: str
    calls: str
    needs_object: bool = False
    opening: str = ""
    opening_named: str = ""


_FIELDS = {
    "default_system": "default_system",
    "system_in_user": "is_system_in_user",
    "replaces_eos": "replaces_eos",
    "tools": "tool_format",
    "reasoning": "is_reasoning",
    "empty_thought": "empty_thought",
    "media": "media",
}
_TUPLES = {"stop": "stop_words", "thoughts": "thoughts", "call_words": "call_words"}
_TURNS = ("user", "assistant", "system", "tool", "call", "prefix")


def _part(value: str | dict[str, str]) -> Part:
    if isinstance(value, str):
        return value
    return Slot("token", value["token"]) if "token" in value else Slot(value["slot"])  # type: ignore[arg-type]


def _template(name: str, table: dict[str, Any]) -> Template:
    unknown = table.keys() - _FIELDS.keys() - _TUPLES.keys() - set(_TURNS)
    assert not unknown, f"template {name}: unknown entries {sorted(unknown)}"
    values: dict[str, Any] = {"name": name}
    for turn in _TURNS:
        if turn in table:
            value = table[turn]
            values[turn] = tuple(map(_part, value if isinstance(value, list) else [value]))
    values.setdefault("tool", values.get("user", _CONTENT))
    values.setdefault("call", values.get("assistant", (*_CONTENT, Slot("eos"))))
    values |= {_FIELDS[key]: table[key] for key in table.keys() & _FIELDS.keys()}
    values |= {_TUPLES[key]: tuple(table[key]) for key in table.keys() & _TUPLES.keys()}
    return Template(**values)


@cache
def _tables() -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """(templates, tool formats) as they stand in the data files."""
    templates: dict[str, dict[str, Any]] = {}
    tool_formats: dict[str, dict[str, Any]] = {}
    for path in sorted(files(__package__).joinpath("data").iterdir(), key=lambda path: path.name):
        if path.name.endswith(".toml"):
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
            target = tool_formats if path.name == "tools.toml" else templates
            assert not target.keys() & tables.keys(), f"{path.name} repeats a template"
            target.update(tables)
    return templates, tool_formats


def _merged(name: str) -> dict[str, Any]:
    table = dict(_tables()[0][name])
    base = table.pop("like", None)
    return {**_merged(base), **table} if base else table


@cache
def named(name: str) -> Template:
    """The template called ``name``. Raises `ConfigurationError`, with near matches, if there is none."""
    if name in template_names():
        return _template(name, _merged(name))
    near = difflib.get_close_matches(name.lower(), template_names(), n=5, cutoff=0.5)
    near += [known for known in template_names() if known not in near and known.startswith(name.lower()[:4])][:3]
    raise ConfigurationError(
        f"There is no chat template called {name!r}.",
        hint=f"Did you mean {', '.join(near)}?" if near else "docs/templates.md lists them; none = the model's own.",
        param="template",
        near=near,
    )


@cache
def template_names() -> tuple[str, ...]:
    return tuple(sorted(name for name in _tables()[0] if not name.startswith("_")))


@cache
def tool_format(name: str) -> ToolFormat:
    """Raises `ConfigurationError` for an unknown name."""
    table = _tables()[1].get(name)
    if table is None:
        raise ConfigurationError(
            f"There is no tool format called {name!r}.",
            hint=f"Known: {', '.join(sorted(_tables()[1]))}.",
            param="tools",
        )
    return ToolFormat(name, **table)
