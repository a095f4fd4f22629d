"""What a model is served with, and what a request asks for beside its messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenfleet.engines.templates.named import Thinking
from tokenfleet.wire.chat import ChatRequest
from tokenfleet.wire.errors import InvalidRequest

_OURS = frozenset({"default_system", "date_string", "enable_thinking", "preserve_thinking"})


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """The served model's settings. Requests override all but ``is_neutral``.

    ``is_neutral``: special tokens written out in users' and tools' texts become ordinary text. Off by default, as in
    LLaMA-Factory and most servers: a program that builds its conversations itself may rely on them."""

    default_system: str | None = None
    enable_thinking: bool | None = True
    preserve_thinking: bool = False
    is_neutral: bool = False


@dataclass(frozen=True, slots=True)
class Wishes:
    """``default_system`` None leaves the template's; ``for_own`` are variables for the model's own chat template."""

    system: str | None
    default_system: str | None
    thinking: Thinking
    date_string: str | None
    for_own: Mapping[str, Any]

    @classmethod
    def of(cls, request: ChatRequest, options: PromptOptions) -> Wishes:
        """``template_kwargs`` may hold ``enable_thinking`` and ``preserve_thinking`` too, as vLLM's clients send them,
        ``default_system`` ("" switches it off) and ``date_string``. Raises `InvalidRequest`."""
        given = request.template_kwargs
        for name in ("default_system", "date_string"):
            if not isinstance(given.get(name, ""), str):
                raise InvalidRequest(f"template_kwargs: {name} must be a string.", param="template_kwargs")
        asked = {"enable_thinking": request.enable_thinking, "preserve_thinking": request.preserve_thinking}
        for name, value in asked.items():
            if not isinstance(given.get(name), bool | None):
                raise InvalidRequest(f"template_kwargs: {name} must be true or false.", param="template_kwargs")
            asked[name] = given.get(name) if value is None else value
        enable, preserve = asked["enable_thinking"], asked["preserve_thinking"]
        for_own = {key: value for key, value in given.items() if key != "default_system"}
        if enable is not None or options.enable_thinking is False:
            for_own["enable_thinking"] = bool(enable)
        if preserve is not None or options.preserve_thinking:
            for_own["preserve_thinking"] = options.preserve_thinking if preserve is None else preserve
        return cls(
            system=request.system,
            default_system=given.get("default_system", options.default_system),
            thinking=Thinking(
                options.enable_thinking if enable is None else enable,
                options.preserve_thinking if preserve is None else preserve,
            ),
            date_string=given.get("date_string"),
            for_own=for_own,
        )

    def check_for_named(self, template: str) -> None:
        """A named template has no further variables. Raises `InvalidRequest`."""
        if unknown := sorted(self.for_own.keys() - _OURS):
            raise InvalidRequest(
                f"The template {template} has no variables {', '.join(unknown)}.",
                hint=f"It takes {', '.join(sorted(_OURS))}.",
                code="unsupported_parameter",
                param="template_kwargs",
            )
