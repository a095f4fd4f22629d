"""Request bodies for the OpenAPI document. The gateway itself checks more, and says so in typed errors."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": ["boolean", "null"]}
_OBJECT: Schema = {"type": ["object", "null"]}
_COUNT: Schema = {"type": ["integer", "null"], "minimum": 1}
_NUMBER: Schema = {"type": ["number", "null"]}
_TEXTS: Schema = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}
_PARTS: Schema = {"type": "array", "items": {"type": "object", "properties": {"type": _TEXT}, "required": ["type"]}}

_MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [_TEXT, _PARTS, {"type": "null"}]},
        "reasoning_content": _TEXT,
        "tool_calls": {"type": "array", "items": {"type": "object"}},
        "tool_call_id": _TEXT,
    },
    "required": ["role"],
}
_SAMPLING: Schema = {
    "model": {**_TEXT, "description": "A served model, or MODEL:ADAPTER."},
    "stream": _FLAG,
    "temperature": {**_NUMBER, "minimum": 0, "maximum": 2},
    "top_p": {**_NUMBER, "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": ["integer", "null"]},
    "min_p": {**_NUMBER, "minimum": 0, "maximum": 1},
    "seed": {"type": ["integer", "null"], "minimum": 0},
    "stop": _TEXTS,
    "presence_penalty": {**_NUMBER, "minimum": -2, "maximum": 2},
    "frequency_penalty": {**_NUMBER, "minimum": -2, "maximum": 2},
    "repetition_penalty": {**_NUMBER, "exclusiveMinimum": 0},
    "structured_outputs": _OBJECT,
    "priority": {"enum": ["interactive", "normal", "batch"]},
    "retention_s": {**_NUMBER, "exclusiveMinimum": 0},
}
_WEBHOOK: Schema = {
    "webhook": {
        "type": ["object", "null"],
        "properties": {"url": _TEXT},
        "required": ["url"],
        "additionalProperties": False,
        "description": "Told when it has ended.",
    }
}
_TOOLS: Schema = {
    "tools": {"type": ["array", "null"], "items": {"type": "object"}},
    "tool_choice": {"anyOf": [{"enum": ["auto", "none", "required"]}, {"type": "object"}]},
    "parallel_tool_calls": _FLAG,
}


def _body(properties: Schema, *required: str) -> Schema:
    """For a route's ``openapi_extra``."""
    return _json(properties, "model", *required)


def _json(properties: Schema, *required: str) -> Schema:
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


CHAT = _body(
    {
        **_SAMPLING,
        **_TOOLS,
        **_WEBHOOK,
        "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
        "stream_options": _OBJECT,
        "n": _COUNT,
        "max_tokens": _COUNT,
        "max_completion_tokens": _COUNT,
        "logprobs": _FLAG,
        "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
        "response_format": _OBJECT,
        "chat_template_kwargs": _OBJECT,
        "reasoning_effort": {"enum": ["none", "minimal", "low", "medium", "high", "xhigh", "max", None]},
        "enable_thinking": _FLAG,
    },
    "messages",
)
COMPLETIONS = _body(
    {
        **_SAMPLING,
        **_WEBHOOK,
        "prompt": {"anyOf": [_TEXTS, {"type": "array", "items": {"type": "integer"}}]},
        "stream_options": _OBJECT,
        "n": _COUNT,
        "max_tokens": _COUNT,
        "logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
    },
    "prompt",
)
RESPONSES = _body(
    {
        **_SAMPLING,
        **_TOOLS,
        **_WEBHOOK,
        "input": {"anyOf": [_TEXT, {"type": "array", "items": {"type": "object"}}]},
        "instructions": {"type": ["string", "null"]},
        "background": _FLAG,
        "store": _FLAG,
        "metadata": {"type": ["object", "null"], "additionalProperties": _TEXT},
        "max_output_tokens": _COUNT,
        "previous_response_id": {"type": ["string", "null"]},
        "text": _OBJECT,
        "reasoning": _OBJECT,
        "include": {"type": ["array", "null"], "items": _TEXT},
        "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
    },
    "input",
)
TOKENIZE = _body(
    {
        "model": _TEXT,
        "prompt": _TEXT,
        "messages": {"type": "array", "items": _MESSAGE},
        "tools": {"type": ["array", "null"], "items": {"type": "object"}},
        "chat_template_kwargs": _OBJECT,
        "add_special_tokens": _FLAG,
        "return_token_strs": _FLAG,
    }
)
DETOKENIZE = _body({"model": _TEXT, "tokens": {"type": "array", "items": {"type": "integer"}}}, "tokens")
SCORES = _body({"model": _TEXT, "messages": {"type": "array", "items": _TEXT}, "max_length": _COUNT}, "messages")
FILES: Schema = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {**_TEXT, "format": "binary"}, "purpose": {"enum": ["batch"]}},
                    "required": ["file", "purpose"],
                }
            }
        },
    }
}
BATCHES = _json(
    {
        **_WEBHOOK,
        "input_file_id": _TEXT,
        "endpoint": {
            "enum": ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/score/evaluation"],
        },
        "completion_window": {**_TEXT, "description": "24h, or any other of minutes, hours or days."},
        "metadata": {"type": ["object", "null"], "additionalProperties": _TEXT},
        "output_expires_after": _OBJECT,
    },
    "input_file_id", "endpoint", "completion_window",
)  # fmt: skip

ERROR: Schema = {
    "description": "An error, in OpenAI's shape.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "error": {
                        "type": "object",
                        "properties": {
                            "message": _TEXT,
                            "type": _TEXT,
                            "param": {"type": ["string", "null"]},
                            "code": {**_TEXT, "description": "Stable; docs/gateway.md lists them."},
                        },
                        "required": ["message", "type", "param", "code"],
                    }
                },
                "required": ["error"],
            }
        }
    },
}
