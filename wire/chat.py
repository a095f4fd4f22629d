"""The chat vocabulary: messages, generation parameters and requests, as producers send and engines read them.

Names and defaults of the generation parameters are LLaMA-Factory's (0.9.5, ``hparams/generating_args.py``); OpenAI's
stand beside them where LLaMA-Factory has none. One meaning each, on every engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_serializer,
    model_validator,
)

Finite = Annotated[float, Field(allow_inf_nan=False)]
_LEAST_TEMPERATURE = 1e-6
"""Below it only logits would share the draw that differ by less than float32 can tell; and 0/0 is not far."""


def _strings(stop: Any) -> Any:
    """One stop string is a list of one, and none an empty one."""
    if isinstance(stop, str):
        return (stop,)
    return () if stop is None else tuple(stop) if isinstance(stop, list) else stop


def _unsigned(seed: int) -> int:
    """OpenAI's seeds are signed; engines' generators take none below 0."""
    return seed % 2**63


class WrongField(ValueError):
    """Two fields that don't go together; ``field`` is the one to name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class TextPart(_Wire):
    type: Literal["text"] = "text"
    text: str

    @model_serializer
    def _whole(self) -> dict[str, str]:
        """With its type, default or not: it tells a part's kind when the request is read again."""
        return {"type": self.type, "text": self.text}


class MediaPart(_Wire):
    """One image, video or audio. ``ref`` is the content hash (sha256, hex) of bytes that lie next to the job."""

    type: Literal["image", "video", "audio"]
    ref: str = Field(pattern=r"^[0-9a-f]{64}$")


ContentPart = Annotated[TextPart | MediaPart, Field(discriminator="type")]


class FunctionCall(_Wire):
    """``arguments`` is a JSON text, as OpenAI clients send and read it."""

    name: str
    arguments: str = "{}"


class ToolCall(_Wire):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


Role = Literal["system", "developer", "user", "assistant", "tool", "observation", "function"]


class Message(_Wire):
    """One turn. ``observation`` and ``tool`` are a tool's result, ``function`` is LLaMA-Factory's name for an
    assistant's call whose content is JSON text."""

    role: Role
    content: str | tuple[ContentPart, ...] | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """The text of all text parts, joined."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content if isinstance(part, TextPart))


_WRAPPER = frozenset({"name", "description", "schema", "strict"})


def _unwrapped(schema: Any) -> Any:
    """The schema itself, out of OpenAI's ``{"name": ..., "schema": {...}}`` if it is in one."""
    if not isinstance(schema, dict) or "type" in schema:
        return schema
    if isinstance(schema.get("schema"), dict) and ("name" in schema or schema.keys() <= _WRAPPER):
        return schema["schema"]
    if "name" in schema and schema.keys() <= _WRAPPER:
        raise ValueError("schema, a JSON schema, is missing beside the name")
    return schema


class ResponseFormat(_Wire):
    """Constrains the output: any JSON object, a JSON schema, a regular expression, or a grammar (EBNF).

    The field that the type is about must be there, and no other may be: it would be ignored."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"] = "text"
    # Aliased: a pydantic model may not have a field called "schema".
    json_schema: Annotated[dict[str, Any] | None, BeforeValidator(_unwrapped)] = None
    pattern: str | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        needed = {"json_schema": "json_schema", "regex": "pattern", "grammar": "grammar"}.get(self.type)
        for name in ("json_schema", "pattern", "grammar"):
            is_there = getattr(self, name) is not None
            if is_there and name != needed:
                raise ValueError(f"{name} is of no use with the type {self.type}")
            if name == needed and not is_there:
                raise ValueError(f"{name} is missing")
        return self


class GenerationParams(_Wire):
    """How to generate. Unknown names are refused; so are NaN and infinite numbers.

    ``do_sample=False``, ``temperature=0`` and ``top_p=0`` all mean greedy. ``top_k <= 0`` switches top-k off, and
    ``top_p=1`` top-p.
    The penalties count the delivered tokens (presence, frequency) or prompt and delivered tokens (repetition), as
    in transformers and OpenAI's API. ``seed`` makes a request reproducible whatever runs beside it; choice i of n
    uses a seed derived from it. ``min_tokens`` bars EOS and stop tokens until that many tokens are out.
    ``max_new_tokens=None`` means up to the context's end; ``max_length`` counts prompt and new tokens together.
    """

    do_sample: bool = True
    temperature: Annotated[Finite, Field(ge=0, le=100)] = 0.95
    top_p: Annotated[Finite, Field(ge=0, le=1)] = 0.7
    top_k: int = Field(50, ge=-1)
    min_p: Annotated[Finite, Field(ge=0, le=1)] = 0.0
    num_beams: int = Field(1, ge=1, le=32)
    max_new_tokens: int | None = Field(1024, ge=1, validation_alias=AliasChoices("max_new_tokens", "max_tokens"))
    max_length: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0, validation_alias=AliasChoices("min_tokens", "min_new_tokens"))
    repetition_penalty: Annotated[Finite, Field(gt=0, le=10)] = 1.0
    length_penalty: Finite = 1.0
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[int, Annotated[Finite, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_strings)] = Field(
        (), max_length=16
    )
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), AfterValidator(_unsigned)] | None = None
    n: int = Field(1, ge=1, le=128, validation_alias=AliasChoices("n", "num_return_sequences"))
    skip_special_tokens: bool = True
    response_format: ResponseFormat = ResponseFormat()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise WrongField("top_logprobs", "top_logprobs needs logprobs=True")
        if self.max_new_tokens is not None and self.min_tokens > self.max_new_tokens:
            raise WrongField(
                "min_tokens", f"min_tokens={self.min_tokens} is above max_new_tokens={self.max_new_tokens}"
            )
        return self

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature < _LEAST_TEMPERATURE or self.top_p == 0


class ChatRequest(_Wire):
    """A conversation and how to continue it.

    ``system`` replaces the template's default system message; a first message of role system does the same.
    ``tools`` are OpenAI tool definitions or LLaMA-Factory's bare functions. ``template_kwargs`` reach the
    tokenizer's own chat template. ``prompt`` bypasses messages and template: raw text, or ready token ids.
    """

    kind: Literal["chat"] = "chat"
    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    system: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    adapter: str | None = None
    enable_thinking: bool | None = None
    preserve_thinking: bool | None = None
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    params: GenerationParams = GenerationParams()

    @property
    def media(self) -> tuple[MediaPart, ...]:
        """All media parts, in the order of the conversation."""
        return tuple(
            part
            for message in self.messages
            if isinstance(message.content, tuple)
            for part in message.content
            if isinstance(part, MediaPart)
        )

    @model_validator(mode="after")
    def _messages_or_prompt(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            why = "messages must not be empty" if self.prompt is None else "give messages or prompt, not both"
            raise WrongField("messages", why)
        return self


class ScoreRequest(_Wire):
    """Texts to be scored by a reward model, one score each. ``max_length`` in tokens, truncating on the right."""

    kind: Literal["score"] = "score"
    texts: tuple[str, ...] = Field(min_length=1)
    max_length: int | None = Field(None, ge=1)
    adapter: str | None = None


Request = Annotated[ChatRequest | ScoreRequest, Field(discriminator="kind")]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "cancelled", "error"]
