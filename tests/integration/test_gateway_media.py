"""Media through OpenAI's API, with the official client; URLs only where the gateway is told to fetch them."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import openai
import pytest

from tests.fleets import MODEL, Fleet, wait_until
from tests.gateways import Gateway, start_gateway
from tests.media import mp4, padded, png, wav
from tests.servers import RedisServer, new_fleet_name

GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def seeing(_session_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(RedisServer(_session_server, new_fleet_name()), tmp_path_factory.mktemp("fleet"))
    fleet.start_worker(modalities=["text", "image", "video", "audio"], token_ms=0, adapters=["poet"])
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def gateways(seeing: Fleet) -> Iterator[tuple[Gateway, Gateway]]:
    """One as it is by default, and one that fetches, also from this machine."""
    plain = start_gateway(seeing, wait=False, max_media_bytes=100_000, storage=seeing.folder / "storage")
    fetching = start_gateway(
        seeing, max_media_bytes=100_000, fetch_urls=True, fetch_allowed_networks='["127.0.0.1/32"]', fetch_timeout_s=30
    )
    wait_up(plain)
    yield plain, fetching
    plain.close()
    fetching.close()


def wait_up(gateway: Gateway) -> None:
    def is_up() -> bool:
        try:
            with urllib.request.urlopen(f"{gateway.url}/health", timeout=2) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    wait_until(is_up, 30, "the gateway is up")


@pytest.fixture
def client(gateways: tuple[Gateway, Gateway]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateways[0].url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def fetching(gateways: tuple[Gateway, Gateway]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateways[1].url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def site() -> Iterator[Any]:
    """Serves ``/png/N``; ``/to/URL`` leads there."""

    class Site(BaseHTTPRequestHandler):
        seen: ClassVar[list[str]] = []

        def do_GET(self) -> None:
            self.seen.append(self.path)
            _, what, rest = self.path.split("/", 2)
            body = png(int(rest)) if what == "png" else b"x" * 200_000 if what == "large" else b""
            self.send_response(302 if what == "to" else 200)
            if what == "to":
                self.send_header("Location", rest)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url, server.seen = f"http://127.0.0.1:{server.server_port}", Site.seen  # type: ignore[attr-defined]
    yield server
    server.shutdown()
    server.server_close()


def url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def image(where: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": where}}


TEXT = {"type": "text", "text": "So?"}


def ask(client: openai.OpenAI, *parts: Any, **named: Any) -> str:
    messages: Any = [{"role": "user", "content": list(parts)}]
    answer = client.chat.completions.create(messages=messages, **{**GREEDY, **named})
    return answer.choices[0].message.content or ""


def test_parts_are_what_a_client_of_ours_sends(client: openai.OpenAI, seeing: Fleet) -> None:
    ours, greedy = seeing.client(), {"do_sample": False, "max_new_tokens": 12}
    cases = [
        ((image(url(png(1))), TEXT), {"images": [png(1)]}),
        ((image(url(png(1))), image(url(png(2))), TEXT), {"images": [png(1), png(2)]}),
        (({"type": "input_audio", "input_audio": {"data": base64.b64encode(wav()).decode(), "format": "wav"}}, TEXT),
         {"audios": [wav()]}),
        (({"type": "video_url", "video_url": {"url": url(mp4(), "video/mp4")}}, TEXT), {"videos": [mp4()]}),
        (({"type": "file", "file": {"file_data": url(mp4(), "video/mp4"), "filename": "a.mp4"}}, TEXT),
         {"videos": [mp4()]}),
    ]  # fmt: skip
    for parts, named in cases:
        assert ask(client, *parts) == ours.chat("So?", **named, **greedy).text, named
    with client.chat.completions.create(
        messages=[{"role": "user", "content": [image(url(png(1))), TEXT]}],  # type: ignore[list-item]
        stream=True, **GREEDY,
    ) as stream:  # fmt: skip
        pieces = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert pieces == ours.chat("So?", images=[png(1)], **greedy).text


def test_the_responses_api_takes_images(client: openai.OpenAI) -> None:
    def respond(content: list[Any], **more: Any) -> Any:
        asked: Any = [{"role": "user", "content": content}]
        return client.responses.create(model=MODEL, temperature=0, max_output_tokens=12, input=asked, **more)

    text = {"type": "input_text", "text": "So?"}
    first = respond([{"type": "input_image", "image_url": url(png(1)), "detail": "auto"}, text])
    assert first.output_text == ask(client, image(url(png(1))), TEXT)
    # A conversation that goes on has its images still: they stay as long as the response does.
    assert respond([text], previous_response_id=first.id).output_text
    assert respond([text]).output_text != first.output_text


def test_rows_of_a_batch_may_have_images(client: openai.OpenAI) -> None:
    def row(number: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": [image(url(png(number))), TEXT]}]
        body = {**GREEDY, "messages": messages}
        return {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}

    rows = "\n".join(json.dumps(row(number)) for number in (1, 2)).encode()
    file = client.files.create(file=("rows.jsonl", rows), purpose="batch")
    asked = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = client.batches.create(input_file_id=file.id, **asked)  # type: ignore[arg-type]
    done = wait_until(lambda: (b := client.batches.retrieve(batch.id)).status == "completed" and b, 40, "the batch")
    lines = map(json.loads, client.files.content(done.output_file_id).text.splitlines())
    texts = {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"] for line in lines}
    assert texts == {str(number): ask(client, image(url(png(number))), TEXT) for number in (1, 2)}


def test_an_idempotency_key_knows_the_same_image(client: openai.OpenAI) -> None:
    def create(number: int) -> str:
        return client.chat.completions.create(
            messages=[{"role": "user", "content": [image(url(png(number))), TEXT]}],  # type: ignore[list-item]
            extra_headers={"Idempotency-Key": "one image"}, **GREEDY,
        ).id  # fmt: skip

    assert create(1) == create(1)
    with pytest.raises(openai.ConflictError):
        create(2)


@pytest.mark.parametrize(
    ("part", "code"),
    [
        (image("https://example.org/a.png"), "url_refused"),
        (image("http://169.254.169.254/latest/meta-data"), "url_refused"),
        (image("/etc/passwd"), "invalid_media"),
        (image("file:///etc/passwd"), "invalid_media"),
        (image(url(b"%PDF")), "unsupported_media"),
        (image(url(wav())), "unsupported_media"),
        (image("data:image/png;base64,!!!!"), "invalid_media"),
        (image(url(padded(png(), 100_001))), "media_too_large"),
        ({"type": "image_url"}, "invalid_media"),
        ({"type": ["image"]}, "unsupported_media"),
        ({"type": "image", "ref": "../../etc/passwd"}, "invalid_request"),
        ({"type": "image", "ref": ["x"]}, "invalid_request"),
        ({"type": "holo"}, "unsupported_media"),
        (7, "unsupported_media"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_medium_is_400(client: openai.OpenAI, part: Any, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, part, TEXT)
    assert caught.value.code == code
    assert "passwd" not in str(caught.value)


def test_texts_may_stand_around_images(client: openai.OpenAI) -> None:
    assert ask(client, TEXT, TEXT) == ask(client, {"type": "text", "text": "So?So?"})
    assert ask(client, "So?", image(url(png(1)))) == ask(client, TEXT, image(url(png(1))))


def test_words_and_images_must_agree(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, image(url(png(1))), {"type": "text", "text": "<image> and <image>"})
    assert caught.value.code == "media_mismatch"


def test_a_medium_that_nobody_has_stored_is_502(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, {"type": "image", "ref": hashlib.sha256(b"nothing").hexdigest()})
    assert caught.value.code == "media_gone"


def test_urls_are_fetched_where_that_is_on(fetching: openai.OpenAI, site: Any) -> None:
    expected = ask(fetching, image(url(png(3))), image(url(png(3))), TEXT)
    assert ask(fetching, image(f"{site.url}/png/3"), image(f"{site.url}/png/3"), TEXT) == expected
    assert site.seen.count("/png/3") == 1, "the same URL is fetched once"
    assert ask(fetching, image(f"{site.url}/to//png/4"), TEXT) == ask(fetching, image(url(png(4))), TEXT)


@pytest.mark.parametrize(
    ("path", "code"),
    [("/large/1", "media_too_large"), ("/nothing/1", "invalid_media"), ("/to/http://10.0.0.1/x.png", "url_refused"),
     ("/to/http://169.254.169.254/latest", "url_refused"), ("/to/file:///etc/passwd", "url_refused")],
)  # fmt: skip
def test_what_a_url_gives_is_checked(fetching: openai.OpenAI, site: Any, path: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(fetching, image(site.url + path), TEXT)
    assert caught.value.code == code


def test_nothing_but_the_allowed_network_is_reached(fetching: openai.OpenAI, site: Any) -> None:
    before = list(site.seen)
    for host in ("127.0.0.2", "[::1]", "0.0.0.0"):
        with pytest.raises(openai.BadRequestError):
            ask(fetching, image(f"http://{host}:{site.server_port}/png/5"), TEXT)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(fetching, *[image(f"{site.url}/png/{k}") for k in range(17)])
    assert caught.value.code == "media_too_large"
    assert site.seen == before


def test_an_adapter_is_a_model_by_name_in_answers_too(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**GREEDY, "messages": [{"role": "user", "content": "Hi"}]}
    plain = client.chat.completions.create(**asked)
    named = client.chat.completions.create(**{**asked, "model": f"{MODEL}:poet"}, store=True)
    by_field = client.chat.completions.create(**asked, extra_body={"adapter": "poet"})
    assert plain.choices != named.choices == by_field.choices
    assert (plain.model, named.model, by_field.model) == (MODEL, f"{MODEL}:poet", f"{MODEL}:poet")
    assert client.chat.completions.retrieve(named.id).model == named.model
    chunks = client.chat.completions.create(**{**asked, "model": f"{MODEL}:poet"}, stream=True)
    assert {chunk.model for chunk in chunks} == {f"{MODEL}:poet"}
    assert client.responses.create(model=f"{MODEL}:poet", input="Hi").model == f"{MODEL}:poet"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**asked, "model": f"{MODEL}:painter"})
    assert (caught.value.code, caught.value.param) == ("unknown_adapter", "adapter")
