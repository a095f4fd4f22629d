"""Engines by name. Each is imported only when it is asked for, since its packages exclude the others'."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from tokenfleet.engines.folders import Folders, first_line
from tokenfleet.wire.errors import ConfigurationError, InvalidRequest

if TYPE_CHECKING:
    from tokenfleet.engines.base import Engine, Media
    from tokenfleet.engines.prompts import RenderedPrompt
    from tokenfleet.engines.tokenizer import Tokenizer
    from tokenfleet.wire.chat import ChatRequest

Options = TypeVar("Options", bound=BaseModel)

ENGINES = ("transformers", "vllm", "sglang", "scripted")
_CLASSES = {
    "transformers": ("hf", "TransformersEngine", "TransformersOptions"),
    "vllm": ("vllm", "VllmEngine", "VllmOptions"),
    "sglang": ("sglang", "SglangEngine", "SglangOptions"),
}
"""The extra that an engine's packages come with, its class and its options'."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What is the same for all engines. ``label`` is the model's public name."""

    label: str
    slots: int | None = None
    template: str | None = None
    default_system: str | None = None
    enable_thinking: bool | None = None
    preserve_thinking: bool = False
    neutral_special_tokens: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    """A started engine with its tokenizer, and how its prompts are rendered.

    ``render(request, media)``: ``media`` are the bytes of the request's media parts, in the order of these."""

    engine: Engine
    tokenizer: Tokenizer
    render: Callable[[ChatRequest, tuple[Media, ...]], RenderedPrompt]


async def load(name: str, args: Mapping[str, Any], settings: ModelSettings) -> Loaded:
    """Load a model into the engine ``name`` with the engine's own options ``args``, and start it.

    Raises `ConfigurationError` (unknown engine or option, a missing extra), `UnknownModel`, `EngineDead`."""
    match name:
        case "scripted":
            return await _scripted(args, settings)
        case "transformers" | "vllm" | "sglang":
            return await _of_model(name, args, settings)
        case _:
            raise ConfigurationError(f"There is no engine {name!r}.", hint=f"Engines: {', '.join(ENGINES)}.")


def options_of(model: type[Options], args: Mapping[str, Any], name: str) -> Options:
    """An engine's options out of plain values. Raises `ConfigurationError` naming the first that is wrong."""
    try:
        return model.model_validate(dict(args))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        said = "There is no such option." if first["type"] == "extra_forbidden" else first["msg"]
        said = f"Engine {name}: {place}{said.removeprefix('Value error, ').rstrip('.')}."
        raise ConfigurationError(said, hint="See docs/settings.md.") from error


async def _scripted(args: Mapping[str, Any], settings: ModelSettings) -> Loaded:
    from tokenfleet.engines.prompts import RenderedPrompt
    from tokenfleet.engines.scripted import ScriptedEngine, ScriptedOptions
    from tokenfleet.engines.templates.choice import offer

    given = {**args} if settings.slots is None else {"slots": settings.slots, **args}
    engine = ScriptedEngine(options_of(ScriptedOptions, given, "scripted"))
    await engine.start()
    tokenizer = engine.tokenizer

    def render(request: ChatRequest, media: tuple[Media, ...]) -> RenderedPrompt:
        if request.prompt is None:
            ids = tokenizer.render_chat(request.messages, system=request.system)
        else:
            ids = tokenizer.encode(request.prompt) if isinstance(request.prompt, str) else list(request.prompt)
        # What it is told to say may hold calls and thoughts as Qwen's models write them.
        parser: dict[str, Any] = {}
        offered = offer(request)
        if offered.forced is not None:
            raise InvalidRequest(
                "A script can't be made to call a tool.", code="unsupported_parameter", hint='Use tool_choice="auto".',
                param="tool_choice",
            )  # fmt: skip
        if offered.tools:
            parser["tools"] = "qwen"
            if not request.parallel_tool_calls:
                parser["parallel"] = False
        if request.enable_thinking:
            parser["think"] = ["<think>", "</think>"]
        return RenderedPrompt(ids=tuple(ids), text=None, parser=parser)

    return Loaded(engine, tokenizer, render)


async def _of_model(name: str, args: Mapping[str, Any], settings: ModelSettings) -> Loaded:
    """An engine that loads a model's files."""
    extra, engine_class, options_class = _CLASSES[name]
    package = f"tokenfleet.engines.{name}_engine"
    given = {"label": settings.label, **args}
    if settings.slots is not None:
        given = {"max_batch_size": settings.slots, **given}
    options = options_of(getattr(importlib.import_module(f"{package}.options"), options_class), given, name)
    if importlib.util.find_spec(name) is None:
        raise missing_extra(extra, name, ModuleNotFoundError(name=name))
    # Before the engine's packages, whose import alone takes many seconds.
    await asyncio.to_thread(_check_names, options, settings)
    try:
        create = getattr(importlib.import_module(package), engine_class)
    except ImportError as error:
        raise missing_extra(extra, name, error) from error
    except (RuntimeError, OSError, AttributeError) as error:  # packages that don't fit together, a missing library
        raise ConfigurationError(
            f"The engine needs {name}, whose import fails: {first_line(error)}",
            code="missing_extra",
            hint=f"Install it in an environment of its own: pip install 'tokenfleet[{extra}]'",
        ) from error
    engine = create(options)
    await engine.start()
    return await asyncio.to_thread(_with_hf_tokenizer, engine, settings)


def _check_names(options: Any, settings: ModelSettings) -> None:
    """What is named must be there. Raises `ConfigurationError`, `UnknownModel`; fetches what is not here yet."""
    if settings.template:
        from tokenfleet.engines.templates.schema import named

        named(settings.template)
    Folders.of(options)


def _with_hf_tokenizer(engine: Any, settings: ModelSettings) -> Loaded:
    from tokenfleet.engines.hf_tokenizer import HFTokenizer
    from tokenfleet.engines.prompts import PromptOptions, renderer

    media = getattr(engine, "media", None)
    return Loaded(
        engine,
        HFTokenizer(engine.tokenizer),
        renderer(
            engine.tokenizer,
            template=settings.template,
            default_system=settings.default_system,
            enable_thinking=settings.enable_thinking,
            options=PromptOptions(
                preserve_thinking=settings.preserve_thinking, is_neutral=settings.neutral_special_tokens
            ),
            expansion_of=media.expansion if media else None,
            tokens_of=getattr(media, "tokens_of", None),
        ),
    )


def missing_extra(extra: str, package: str, error: ImportError) -> ConfigurationError:
    """What to install on this machine, for an engine whose packages are not there."""
    said = f"The engine {package} is not installed here."
    if error.name != package:
        said = f"The engine needs {package}, which can't be imported ({error.name or error})."
    return ConfigurationError(said, code="missing_extra", hint=f"Install it: pip install 'tokenfleet[{extra}]'")
