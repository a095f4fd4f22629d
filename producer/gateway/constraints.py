"""What an answer is to look like: OpenAI's response_format, vLLM's structured_outputs and its older guided_*."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tokenfleet.wire.errors import InvalidRequest

_GUIDED = {"json": "guided_json", "regex": "guided_regex", "grammar": "guided_grammar", "choice": "guided_choice"}
CONSTRAINTS = ("response_format", "structured_outputs", *_GUIDED.values())


def constraint_of(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """As `wire.chat.ResponseFormat`; None for free text. Raises `InvalidRequest` (also for two at once)."""
    found = [c for c in (_openai(body.get("response_format")), _vllm(body)) if c is not None]
    if len(found) > 1:
        raise InvalidRequest("Give response_format or structured_outputs, not both.", param="structured_outputs")
    return found[0] if found else None


def _openai(wanted: Any) -> dict[str, Any] | None:
    if wanted is None:
        return None
    if not isinstance(wanted, Mapping):
        raise InvalidRequest("response_format: an object is needed.", param="response_format")
    match wanted.get("type"):
        case "text":
            return None
        case "json_object":
            return {"type": "json_object"}
        case "json_schema":
            inner = wanted.get("json_schema")
            schema = inner.get("schema") if isinstance(inner, Mapping) else None
            if not isinstance(schema, Mapping):
                raise InvalidRequest("response_format.json_schema.schema is needed.", param="response_format")
            return {"type": "json_schema", "json_schema": schema}
        case "regex" | "grammar" as kind:  # not OpenAI's: as everywhere else here
            name = "pattern" if kind == "regex" else "grammar"
            if not isinstance(wanted.get(name), str):
                raise InvalidRequest(f"response_format.{name}: a string is needed.", param="response_format")
            return {"type": kind, name: wanted[name]}
        case other:
            raise InvalidRequest(f"response_format: unknown type {str(other)[:64]!r}.", param="response_format")


def _vllm(body: Mapping[str, Any]) -> dict[str, Any] | None:
    given = body.get("structured_outputs")
    if not isinstance(given, Mapping | None):
        raise InvalidRequest("structured_outputs: an object is needed.", param="structured_outputs")
    outputs = {name: value for name, value in (given or {}).items() if value is not None}
    outputs |= {name: body[old] for name, old in _GUIDED.items() if body.get(old) is not None}
    if not isinstance(outputs.get("json_object", False), bool):
        raise InvalidRequest("structured_outputs: json_object is true or false.", param="structured_outputs")
    if outputs.get("json_object") is False:
        del outputs["json_object"]
    if not outputs:
        return None
    if len(outputs) > 1 or not outputs.keys() <= {*_GUIDED, "json_object"}:
        raise InvalidRequest(
            f"structured_outputs: one of {', '.join(_GUIDED)}, json_object is needed.", param="structured_outputs"
        )
    [(name, value)] = outputs.items()
    match name, value:
        case "json_object", _:
            return {"type": "json_object"}
        case "json", Mapping():
            return {"type": "json_schema", "json_schema": value}
        case "regex", str():
            return {"type": "regex", "pattern": value}
        case "grammar", str():
            return {"type": "grammar", "grammar": value}
        case "choice", [*choices] if choices and all(isinstance(choice, str) and choice for choice in choices):
            return {"type": "regex", "pattern": "|".join(re.escape(choice) for choice in choices)}
        case _:
            raise InvalidRequest(f"structured_outputs: {name} is of the wrong type.", param="structured_outputs")
