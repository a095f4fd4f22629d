"""LLaMA-Factory's arguments as flags, as a YAML or JSON file, and as ``key=value`` words.

The names and types are those of `FleetArguments` and `GenerationParams`: what these know is a flag, spelled with ``_``
or ``-``. Nothing unknown passes: click refuses flags, `split_arguments` the names of files and words.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click
import yaml
from click.core import ParameterSource
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tokenfleet.cli.argument_help import HELP, SECTIONS
from tokenfleet.producer.arguments import FleetArguments
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.errors import ConfigurationError
from tokenfleet.wire.jobs import JobOptions

Command = TypeVar("Command", bound=Callable[..., Any])

CONTEXT: dict[str, Any] = {"token_normalize_func": lambda name: name.replace("-", "_"), "max_content_width": 110}
_ALIASES = {"max_new_tokens": "max_tokens", "min_tokens": "min_new_tokens", "n": "num_return_sequences"}
_MODELS: tuple[type[BaseModel], ...] = (FleetArguments, GenerationParams, JobOptions)
_ENVIRONMENT = {"redis_url": "TOKENFLEET_REDIS_URL", "fleet": "TOKENFLEET_FLEET"}


class Argument(click.Option):
    """An option that knows its section of the help text."""

    def __init__(self, *args: Any, section: str, **more: Any) -> None:
        super().__init__(*args, **more)
        self.section = section


class SectionedCommand(click.Command):
    """Shows its `Argument`s by section; all other options come last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None and isinstance(option, click.Option):
                sections.setdefault(getattr(option, "section", "Options"), []).append(record)
        last = sections.pop("Options", [])
        for title, records in (*sections.items(), ("Options", last)):
            with formatter.section(title):
                formatter.write_dl(records)


def argument_options(*titles: str, without: Iterable[str] = ()) -> Callable[[Command], Command]:
    """Options for all arguments in the sections ``titles`` of `SECTIONS`."""
    hidden = frozenset(without)

    def decorate(command: Command) -> Command:
        for title in reversed(titles):
            for name in reversed(SECTIONS[title]):
                if name not in hidden:
                    command = _option(name, title)(command)
        return command

    return decorate


def given_flags(ctx: click.Context) -> dict[str, Any]:
    """The `Argument`s on the command line, read to values of their types."""
    flags: dict[str, Any] = {}
    for option in ctx.command.params:
        if not isinstance(option, Argument) or option.name is None:
            continue
        if ctx.get_parameter_source(option.name) is ParameterSource.COMMANDLINE:
            value = ctx.params[option.name]
            flags[option.name] = list(value) if option.multiple else read_value(option.name, value)
    return flags


def from_environment(ctx: click.Context) -> dict[str, Any]:
    """Where the fleet is, if the environment says so: what a file or a flag says comes first."""
    return {
        name: ctx.params[name]
        for name in _ENVIRONMENT
        if ctx.get_parameter_source(name) is ParameterSource.ENVIRONMENT and ctx.params[name]
    }


def merged(words: Sequence[str], flags: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments out of ``[FILE] [key=value ...]`` and flags; the later wins, the environment comes last.

    Raises `ConfigurationError`."""
    arguments: dict[str, Any] = dict(environment)
    rest = list(words)
    if rest and rest[0].lower().endswith((".yaml", ".yml", ".json")):
        arguments |= {_own_name(name): value for name, value in read_file(Path(rest.pop(0))).items()}
    for word in rest:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigurationError(
                f"{word!r} is neither key=value nor a file.", hint="The file (.yaml, .yml, .json) comes first."
            )
        name, *path = key.lstrip("-").replace("-", "_").split(".")
        name = _own_name(name)
        if not path:
            arguments[name] = read_value(name, text)
            continue
        inner = arguments[name] = dict(arguments[name]) if isinstance(arguments.get(name), Mapping) else {}
        for step in path[:-1]:
            inner[step] = dict(inner[step]) if isinstance(inner.get(step), Mapping) else {}
            inner = inner[step]
        inner[path[-1]] = _yaml(key, text)
    return arguments | dict(flags)


def read_file(path: Path) -> dict[str, Any]:
    """A flat file of arguments, as LLaMA-Factory takes it."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigurationError(f"{path} can't be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigurationError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigurationError(f"{path} holds no arguments.", hint="A mapping is needed: name: value, one a line.")
    return content


def read_value(name: str, text: str) -> Any:
    """A word's value: text where the argument is text, else as YAML reads it (numbers, true, [lists], {mappings})."""
    field = _field(name)
    kinds = _kinds(field.annotation) if field is not None else {str}
    if kinds <= {str, type(None)} or Literal in kinds:
        return text
    if str in kinds and not text.lstrip().startswith(("{", "[")):
        return text
    if name == "response_format" and not text.lstrip().startswith("{"):
        return {"type": text}
    if name == "stop":
        return text
    if kinds & {tuple, list} and not text.lstrip().startswith("["):
        text = f"[{text}]"
    return _yaml(name, text)


def _yaml(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{name}: {text!r} can't be read as a value.") from error


def _option(name: str, section: str) -> Callable[[Command], Command]:
    field = _field(name)
    assert field is not None, name
    kinds = _kinds(field.annotation)
    names = [f"--{name}", *([f"--{_ALIASES[name]}"] if name in _ALIASES else [])]
    more: dict[str, Any] = {"help": HELP[name], "default": None, "envvar": _ENVIRONMENT.get(name)}
    if bool in kinds:
        more |= {"is_flag": False, "flag_value": "true", "metavar": "[true|false]"}
    elif choices := _choices(field.annotation):
        more |= {"type": click.Choice(choices)}
    elif name == "stop":
        more |= {"multiple": True, "metavar": "TEXT"}
    elif float in kinds:
        more |= {"metavar": "NUMBER"}
    elif int in kinds and not kinds & {tuple, dict}:
        more |= {"metavar": "INTEGER"}
    elif kinds & {dict}:
        more |= {"metavar": "JSON"}
    else:
        more |= {"metavar": "TEXT"}
    return click.option(*names, name, cls=Argument, section=section, **more)


def _own_name(name: str) -> str:
    return next((own for own, alias in _ALIASES.items() if alias == name), name)


def _field(name: str) -> FieldInfo | None:
    return next((model.model_fields[name] for model in _MODELS if name in model.model_fields), None)


def _kinds(annotation: Any) -> set[Any]:
    """The plain types an annotation is made of: ``float | None`` → {float, NoneType}."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return set().union(*map(_kinds, get_args(annotation)))
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _kinds(get_args(annotation)[0])
    return {origin or annotation}


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)] if get_args(annotation) else []
