"""LLaMA-Factory's `ChatModel`, on a fleet: same arguments, same calls, any number of callers and threads."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from tokenfleet.producer.aio_job import AsyncStream, piece_of
from tokenfleet.producer.arguments import ALIASES, FleetArguments, split_arguments
from tokenfleet.producer.local_fleet import LocalFleet, ensure
from tokenfleet.producer.sync import Client
from tokenfleet.wire.errors import ConfigurationError
from tokenfleet.wire.requests import Messages
from tokenfleet.wire.results import ChatResult

_Media = Sequence[Any] | None


@dataclass
class Response:
    """One choice, in LLaMA-Factory's words; lengths in tokens."""

    response_text: str
    response_length: int
    prompt_length: int
    finish_reason: Literal["stop", "length"] | str


class ChatModel:
    """Chat with a model as LLaMA-Factory's class of this name does.

    ``args`` with a model (``model_name_or_path``, ``template``, ``infer_backend``, …) starts a private local fleet that
    is gone with this process or at `close`; ``args={"redis_url": …, "model": …}`` connects to a running one, and may
    have ``enable_thinking`` besides, but nothing that workers decide. None or an empty ``args`` takes the default small
    model. Generation parameters among ``args`` are defaults of every call.
    Raises `ConfigurationError` for unknown arguments, by name."""

    def __init__(self, args: Mapping[str, Any] | None = None) -> None:
        self.args, self._defaults = split_arguments(args or {})
        self._fleet: LocalFleet | None = None
        url, fleet, media = self.args.redis_url, self.args.fleet, None
        if url is None:
            self._fleet = _start(self.args)
            url, fleet, media = self._fleet.url, self._fleet.fleet, self._fleet.media
        elif self.args.model_name_or_path:
            raise ConfigurationError(
                "redis_url and model_name_or_path exclude one another.",
                hint="A running fleet's models have names: give model.",
            )
        else:
            self.args.check_remote()
            self._defaults["enable_thinking"] = self.args.enable_thinking
        try:
            model = self.args.served_as if self._fleet is not None or self.args.model else None
            self._client = Client(url, fleet=fleet, model=model, media=media)
        except BaseException:
            self._stop()
            raise

    @property
    def client(self) -> Client:
        """The asynchronous API beneath: submit, stream, cancel."""
        return self._client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, and stop the private fleet."""
        try:
            self._client.close()
        finally:
            self._stop()

    def chat(
        self,
        messages: Messages,
        system: str | None = None,
        tools: str | Sequence[Mapping[str, Any]] | None = None,
        images: _Media = None,
        videos: _Media = None,
        audios: _Media = None,
        **input_kwargs: Any,
    ) -> list[Response]:
        """The whole answer, one `Response` a choice. ``messages`` is never changed. Ctrl-C cancels the job."""
        request = self._named(system, tools, images, videos, audios, input_kwargs)
        return _responses(self._client.chat(messages, **request))

    async def achat(
        self,
        messages: Messages,
        system: str | None = None,
        tools: str | Sequence[Mapping[str, Any]] | None = None,
        images: _Media = None,
        videos: _Media = None,
        audios: _Media = None,
        **input_kwargs: Any,
    ) -> list[Response]:
        """`chat`, for any event loop."""
        request = self._named(system, tools, images, videos, audios, input_kwargs)
        return _responses(await self._client.thread.arun(self._client.aio.chat(messages, **request)))

    def stream_chat(
        self,
        messages: Messages,
        system: str | None = None,
        tools: str | Sequence[Mapping[str, Any]] | None = None,
        images: _Media = None,
        videos: _Media = None,
        audios: _Media = None,
        **input_kwargs: Any,
    ) -> Generator[str, None, None]:
        """The answer's text as it is written. Closing the generator early cancels the job."""
        request = self._named(system, tools, images, videos, audios, input_kwargs)
        with self._client.submit(messages, **request, cancel_on_disconnect=True).stream() as stream:
            yield from stream.text()

    async def astream_chat(
        self,
        messages: Messages,
        system: str | None = None,
        tools: str | Sequence[Mapping[str, Any]] | None = None,
        images: _Media = None,
        videos: _Media = None,
        audios: _Media = None,
        **input_kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        """`stream_chat`, for any event loop."""
        thread, aio = self._client.thread, self._client.aio
        request = self._named(system, tools, images, videos, audios, input_kwargs)
        streams: list[AsyncStream] = []

        async def begin() -> AsyncStream:
            job = await aio.submit(messages, **request, cancel_on_disconnect=True)
            streams.append(job.stream())
            return streams[0]

        try:
            stream = await thread.arun(begin())
            while batch := await thread.arun(stream.next_batch()):
                for _, event in batch:
                    if piece := piece_of(event):
                        yield piece
        finally:
            for each in streams:  # also where we were cancelled just as it was made
                await thread.finish(each.aclose())

    def get_scores(self, batch_input: Sequence[str], **input_kwargs: Any) -> list[float]:
        """One reward a text."""
        return list(self._client.scores(batch_input, **input_kwargs).scores or ())

    async def aget_scores(self, batch_input: Sequence[str], **input_kwargs: Any) -> list[float]:
        """`get_scores`, for any event loop."""
        result = await self._client.thread.arun(self._client.aio.scores(batch_input, **input_kwargs))
        return list(result.scores or ())

    def _named(
        self, system: Any, tools: Any, images: _Media, videos: _Media, audios: _Media, more: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What `Client.submit` takes; what is given in the call wins over the defaults, by whichever of its names, and
        None is not given, as in LLaMA-Factory. There a call's ``max_length`` wins over a default ``max_new_tokens``."""
        named = {name: value for name, value in more.items() if value is not None}
        given = {ALIASES.get(name, name) for name in named}
        given |= {"max_new_tokens"} if "max_length" in given else set()
        defaults = {name: value for name, value in self._defaults.items() if ALIASES.get(name, name) not in given}
        media = {"images": images, "videos": videos, "audios": audios}
        return {**defaults, **named, "system": system, "tools": tools, **media}

    def _stop(self) -> None:
        if self._fleet is not None:
            self._fleet.stop()
            self._fleet = None


def _start(args: FleetArguments) -> LocalFleet:
    fleet = ensure(config=args.local_fleet(persistent=False), private=True)
    try:
        fleet.wait_ready(timeout_s=3600.0)
    except BaseException:
        fleet.stop()
        raise
    return fleet


def _responses(result: ChatResult) -> list[Response]:
    return [
        Response(choice.text, len(choice.ids), result.usage.prompt_tokens, choice.finish_reason)
        for choice in result.choices
    ]
