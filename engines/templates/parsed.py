"""LLaMA-Factory's reading of a model's own chat template for ``template: null``: probed, and taken apart into turns."""

from __future__ import annotations

import json

from tokenfleet.engines.templates.own import render
from tokenfleet.engines.templates.schema import Part, Template
from tokenfleet.engines.templates.tokens import Tokenizer
from tokenfleet.wire.errors import ConfigurationError, InvalidRequest

_MARK = "{{content}}"


def parsed(tokenizer: Tokenizer) -> Template:
    """The model's own chat template taken apart into turns, as LLaMA-Factory 0.9.5 does for ``template: null``.

    Known weaknesses, kept: where the template writes BOS itself, BOS is in every user's turn; what only stands before
    the next answer (an opened ``<think>``) stands before earlier answers too.
    Raises `ConfigurationError` where the template doesn't answer the probes (some refuse a system message)."""

    def probe(*messages: tuple[str, str], header: bool = False) -> str:
        dicts = [{"role": role, "content": content} for role, content in messages]
        try:
            return render(tokenizer, dicts, add_generation_prompt=header)
        except InvalidRequest as error:
            raise ConfigurationError(f"The model's chat template can't be parsed. {error.message}") from error

    before = str(tokenizer.decode(tokenizer.encode("")))
    system = probe(("system", _MARK))[len(before) :]
    without_default = probe(("system", ""), ("user", _MARK), header=True)[len(before) :]
    user = probe(("user", _MARK), header=True)[len(before) :]
    assistant = probe(("user", _MARK), ("assistant", _MARK))[len(before) + len(user) :]
    is_reasoning = "<think>" in assistant
    assistant = assistant.replace("<think>", "").replace("</think>", "").lstrip("\n")
    default_system = ""
    if len(user) > len(without_default):
        default_system = _added(without_default, user)
        user = user[len(system.replace(_MARK, default_system, 1)) :]
    return Template(
        name="parsed",
        user=_slot(user),
        assistant=_slot(assistant),
        system=_slot(system),
        tool=_slot(user),
        call=_slot(assistant),
        prefix=(_literal(before),) if before else (),
        default_system=default_system,
        is_reasoning=is_reasoning,
    )


def _added(shorter: str, longer: str) -> str:
    """The characters of ``longer`` that are not in ``shorter``, as long as some of it is left."""
    at, added = 0, []
    for char in longer:
        if at == len(shorter):
            break
        if char == shorter[at]:
            at += 1
        else:
            added.append(char)
    return "".join(added)


def _slot(text: str) -> tuple[Part, ...]:
    head, mark, tail = text.partition(_MARK)
    return (_literal(head) + ("{{ content }}" if mark else "") + _literal(tail),)


def _literal(text: str) -> str:
    """``text`` as Jinja source that gives just it."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""
