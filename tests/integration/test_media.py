"""Images, videos and audios on their way through a real fleet: stored once, never in a message, gone in time."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleets import MODEL, Fleet, wait_until
from tests.media import mp4, padded, png, wav
from tests.servers import RedisServer, new_fleet_name, running_server
from tokenfleet import Client, Job
from tokenfleet.wire.errors import InvalidRequest, MediaGone, Overloaded, UnknownJob, UnknownModel
from tokenfleet.wire.keys import media_entry
from tokenfleet.wire.media import MediaSettings

ALL_KINDS = ["text", "image", "video", "audio"]
GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def seeing(_session_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet whose engine takes all kinds, with a folder for large media."""
    fleet = Fleet(RedisServer(_session_server, new_fleet_name()), tmp_path_factory.mktemp("fleet"))
    fleet.start_worker(modalities=ALL_KINDS, token_ms=0, env={"TOKENFLEET_MEDIA_FOLDER": str(fleet.folder / "media")})
    yield fleet
    fleet.close()


def settings(fleet: Fleet, **values: Any) -> MediaSettings:
    return MediaSettings(folder=fleet.folder / "media", **values)


def text_of(client: Client, messages: Any, **named: Any) -> str:
    return client.chat(messages, **GREEDY, **named).text


def entry(data: bytes, tenant: str = "") -> str:
    return media_entry(tenant, hashlib.sha256(data).hexdigest())


def keys(fleet: Fleet, pattern: str = "*") -> list[str]:
    with fleet.redis.client(decode_responses=True) as client:
        return sorted(client.scan_iter(f"tokenfleet:{fleet.redis.fleet}:{pattern}", count=1000))


def files(fleet: Fleet) -> list[Path]:
    return [path for path in (fleet.folder / "media").rglob("*") if path.is_file()]


def test_a_medium_has_its_effect_and_another_another(seeing: Fleet) -> None:
    client = seeing.client()
    texts = {
        name: text_of(client, "So?", **media)
        for name, media in {
            "none": {}, "one": {"images": [png(1)]}, "other": {"images": [png(2)]},
            "both": {"images": [png(1), png(2)]}, "turned": {"images": [png(2), png(1)]},
            "audio": {"audios": [wav(1)]}, "video": {"videos": [mp4(1)]},
        }.items()
    }  # fmt: skip
    assert len(set(texts.values())) == len(texts), texts
    assert text_of(client, "So?", images=[png(1)]) == texts["one"]
    data_url = f"data:image/png;base64,{base64.b64encode(png(1)).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": data_url}}, {"type": "text", "text": "So?"}]
    assert text_of(client, [{"role": "user", "content": parts}]) == texts["one"]


def test_the_queue_and_the_ledger_hold_hashes_only(seeing: Fleet) -> None:
    client, image = seeing.client(), padded(png(3), 100_000)
    job = client.submit("Look", images=[image], delay_s=60)
    with seeing.redis.client() as redis:
        request = redis.hget(f"tokenfleet:{seeing.redis.fleet}:job:{job.id}", "request")
        assert len(request) < 400
        assert hashlib.sha256(image).hexdigest().encode() in request
        assert redis.hget(f"tokenfleet:{seeing.redis.fleet}:media:{entry(image)}", "data") == image
    job.cancel()


def test_jobs_and_tenants_share_what_is_theirs(seeing: Fleet) -> None:
    client, image = seeing.client(), padded(png(4), 1_000_000)
    text_of(client, "So?", images=[png(4)])  # a script that Redis has not yet is sent with all its arguments once more
    with seeing.redis.client() as redis:
        before = redis.info("stats")["total_net_input_bytes"]
        jobs = client.submit_many([f"question {k}" for k in range(20)], images=[image], **GREEDY)
        texts = {job.result(20).text for job in jobs}
        sent = redis.info("stats")["total_net_input_bytes"] - before
    assert len(texts) == 20
    assert sent < 2 * len(image), "it was uploaded more than once"
    assert len(keys(seeing, f"media:{entry(image)}")) == 1
    part = client.upload("image", image, tenant="blue")
    assert len(keys(seeing, f"media:*:{part.ref}")) == 2, "tenants have copies of their own"
    with pytest.raises(MediaGone):
        client.submit([{"role": "user", "content": [part]}], tenant="green")


def test_a_part_by_reference_is_as_good_as_its_bytes(seeing: Fleet) -> None:
    client = seeing.client()
    part = client.upload("image", png(5))
    by_ref = text_of(client, [{"role": "user", "content": [part.model_dump(), {"type": "text", "text": "So?"}]}])
    assert by_ref == text_of(client, "So?", images=[png(5)])
    unknown = {"type": "image", "ref": "0" * 64}
    with pytest.raises(MediaGone) as caught:
        client.submit([{"role": "user", "content": [unknown]}])
    assert (caught.value.code, caught.value.details["missing"]) == ("media_gone", ["0" * 64])


def test_large_media_are_files_and_go_with_their_jobs(seeing: Fleet) -> None:
    client = seeing.client(media=settings(seeing, inline_bytes=1000))
    large = padded(png(6), 5000)
    held = client.submit("Look", images=[large], delay_s=600, retention_s=2.0)  # it is there until we have looked
    assert text_of(client, "So?", images=[large], retention_s=2.0) == text_of(
        seeing.client(), "So?", images=[large], retention_s=2.0
    ), "in Redis or in a file, it is the same medium"
    [file] = files(seeing)
    assert file.read_bytes() == large
    assert file.stat().st_mode & 0o077 == 0o040
    store = client.aio.media
    assert client.thread.run(store.sweep(grace_s=0)) == 0, "Redis names it"
    held.cancel()
    wait_until(lambda: not keys(seeing, f"media*{entry(large)}"), 10, "its time is over")
    assert client.thread.run(store.sweep(grace_s=3600)) == 0, "it could be about to be named"
    assert client.thread.run(store.sweep(grace_s=0)) == 1
    assert files(seeing) == []


def test_a_file_that_is_lost_is_sent_again(seeing: Fleet) -> None:
    client, large = seeing.client(media=settings(seeing, inline_bytes=1000)), padded(png(15), 3000)
    text = text_of(client, "So?", images=[large], retention_s=30)
    for file in files(seeing):
        file.unlink()
    assert text_of(client, "So?", images=[large], retention_s=1) == text
    for file in files(seeing):
        file.unlink()
    with pytest.raises(MediaGone) as caught:
        text_of(seeing.client(), "So?", images=[large])  # one without a folder can't know
    assert "share" in caught.value.hint
    assert text_of(client, "So?", images=[large], retention_s=1) == text


def test_expiry_follows_the_jobs_that_need_it(seeing: Fleet) -> None:
    client, image = seeing.client(media=settings(seeing, upload_ttl_s=60.0)), png(7)
    name = f"tokenfleet:{seeing.redis.fleet}:media:{entry(image)}"
    with seeing.redis.client() as redis:
        client.upload("image", image)
        assert 0 < redis.pttl(name) <= 60_000
        late = client.submit("Look", images=[image], delay_s=100, queue_ttl_s=200, deadline_s=1000)
        assert 270_000 < redis.pttl(name) <= 305_000, "as long as it may wait in the queue"
        running = client.submit("Look", images=[image], max_new_tokens=30_000, deadline_s=900, retention_s=2.0)
        wait_until(lambda: running.status().completion_tokens > 5, 10, "it runs")
        assert 850_000 < redis.pttl(name) <= 905_000, "as long as it may run"
        running.cancel()
        assert 250_000 < redis.pttl(name) <= 305_000, "the other one still needs it"
        late.cancel()
        assert redis.pttl(name) <= 600_000
        # Nothing else holds it now but the retention of `late` (10 min): each further job may only lengthen it.
        assert redis.zrange(name.replace("media:", "media-jobs:"), 0, -1) == [b"kept"]


def test_after_the_end_and_retention_nothing_is_left(seeing: Fleet) -> None:
    client = seeing.client(media=settings(seeing, inline_bytes=1000))
    small, large = png(8), padded(png(9), 4000)
    endings = {
        "finishes": {"max_new_tokens": 5},
        "fails": {"messages": "[[fault: raise at 2]]"},
        "expires": {"queue_ttl_s": 0.05, "delay_s": 0.1},
        "is cancelled": {"delay_s": 30},
    }
    for how, named in endings.items():
        job = client.submit(**{"messages": how, "images": [small, large], "retention_s": 0.5, **named})
        if how == "is cancelled":
            job.cancel()
        wait_until(lambda job=job: is_over(job), 20, how)
    for data in (small, large):
        wait_until(lambda data=data: not keys(seeing, f"media*{entry(data)}"), 10, "no key is left")
    client.thread.run(client.aio.media.sweep(grace_s=0))
    assert [path for path in files(seeing) if path.name.startswith(hashlib.sha256(large).hexdigest())] == []


def is_over(job: Job) -> bool:
    """Ended, or even forgotten."""
    try:
        return job.status().is_ended
    except UnknownJob:
        return True


def test_media_that_expire_before_submit_are_sent_again(seeing: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    client, image = seeing.client(), png(10)
    ledger, tries = client.aio.ledger, []
    submit = ledger.submit

    async def late(*args: Any, **named: Any) -> int:
        tries.append(named["media"])
        if len(tries) == 1:
            await ledger.client.delete(ledger.keys.media(entry(image)))
        return await submit(*args, **named)

    monkeypatch.setattr(ledger, "submit", late)
    assert client.chat("Look", images=[image], **GREEDY).text
    assert len(tries) == 2


def test_a_claim_that_finds_its_media_gone_fails_its_job_alone(seeing: Fleet) -> None:
    client, image = seeing.client(), png(11)
    with seeing.workers[0].frozen(), seeing.redis.client() as redis:
        job = client.submit("Look", images=[image])
        redis.delete(f"tokenfleet:{seeing.redis.fleet}:media:{entry(image)}")
    with pytest.raises(MediaGone) as caught:
        job.result(20)
    assert caught.value.retryable
    assert text_of(client, "still there?")


def test_bytes_under_a_wrong_hash_are_no_medium(seeing: Fleet) -> None:
    client, image = seeing.client(), png(12)
    with seeing.workers[0].frozen(), seeing.redis.client() as redis:
        job = client.submit("Look", images=[image])
        redis.hset(f"tokenfleet:{seeing.redis.fleet}:media:{entry(image)}", "data", png(13))
    with pytest.raises(InvalidRequest) as caught:
        job.result(20)
    assert caught.value.code == "invalid_media"


@pytest.mark.parametrize("name", ["../../../../etc/passwd", "x", ""])
def test_a_file_name_out_of_redis_is_no_path(seeing: Fleet, name: str) -> None:
    client, image = seeing.client(), png(14)
    key = f"tokenfleet:{seeing.redis.fleet}:media:{entry(image)}"
    with seeing.workers[0].frozen(), seeing.redis.client() as redis:
        job = client.submit("Look", images=[image])
        redis.hdel(key, "data")
        redis.hset(key, "file", name)
    with pytest.raises(MediaGone):
        job.result(20)


def test_what_a_model_can_not_take_is_refused_at_submit_and_by_its_worker(served: Fleet) -> None:
    client = served.client()
    with pytest.raises(InvalidRequest) as caught:
        client.submit("Look", images=[png(1)])
    assert caught.value.code == "unsupported_modality"
    assert keys(served, "media*") == [], "nothing was uploaded for it"
    with pytest.raises(UnknownModel):
        client.submit("Look", images=[png(1)], model="another")
    # A client that does not ask the registry: the worker refuses it before it fetches or prefills anything.
    part = client.upload("image", png(1))
    body = json.dumps({"kind": "chat", "messages": [{"role": "user", "content": [part.model_dump()]}]}).encode()
    from tokenfleet.wire.jobs import JobOptions
    from tokenfleet.wire.keys import new_id

    job_id = new_id()
    client.thread.run(client.aio.ledger.submit(job_id, MODEL, body, JobOptions(), media=[entry(png(1))]))
    with pytest.raises(InvalidRequest) as caught:
        client.job(job_id).result(20)
    assert caught.value.code == "unsupported_modality"
    assert job_id not in json.dumps([line for line in served.workers[0].record if line["event"] == "prefill"])


def test_sync_and_async_take_the_same(seeing: Fleet) -> None:
    from tokenfleet import AsyncClient

    async def chat() -> str:
        async with AsyncClient(seeing.redis.url, fleet=seeing.redis.fleet, model=MODEL) as client:
            part = await client.upload("audio", wav(3))
            many = await client.submit_many(
                [{"messages": "So?", "images": [png(1)]}, "<image>?"], images=[png(2)], **GREEDY
            )
            texts = [(await job.result()).text for job in many]
            texts.append((await client.chat([{"role": "user", "content": [part]}], **GREEDY)).text)
            return "|".join(texts)

    client = seeing.client()
    part = client.upload("audio", wav(3))
    texts = [text_of(client, "So?", images=[png(1)]), text_of(client, "<image>?", images=[png(2)])]
    assert asyncio.run(chat()) == "|".join([*texts, text_of(client, [{"role": "user", "content": [part]}])])


def test_chat_model_takes_what_llamafactory_takes(seeing: Fleet, tmp_path: Path) -> None:
    from tokenfleet import ChatModel

    path = tmp_path / "a.png"
    path.write_bytes(png(1))
    messages = [{"role": "user", "content": "<image>So?"}]
    with ChatModel({"redis_url": seeing.redis.url, "fleet": seeing.redis.fleet, "model": MODEL, **GREEDY}) as model:
        [whole] = model.chat(messages, None, None, [str(path)])
        assert "".join(model.stream_chat(messages, images=[path])) == whole.response_text
        assert asyncio.run(model.achat(messages, images=[png(1)]))[0].response_text == whole.response_text
        assert model.chat(messages, None, None, [png(2)], [mp4(1)], [wav(1)])[0].response_text != whole.response_text
    assert messages == [{"role": "user", "content": "<image>So?"}]


def test_a_full_redis_refuses_media_before_its_limit() -> None:
    """By the memory that is used now: a burst of uploads is no news to the last reap's sample."""
    with running_server(maxmemory="40mb") as server:
        fleet = RedisServer(server, new_fleet_name())
        with Client(fleet.url, fleet=fleet.fleet) as client, fleet.client() as redis:
            stored = 0
            with pytest.raises(Overloaded) as caught:  # noqa: PT012
                for number in range(20):
                    client.upload("image", padded(png(number), 4 * 1024 * 1024))
                    stored += 1
            assert caught.value.code == "memory_full"
            assert caught.value.retry_after_s > 0
            assert 3 <= stored <= 8
            info = redis.info("memory")
            assert info["used_memory"] < 0.9 * info["maxmemory"], "what heals a full Redis must still have room"
            assert client.upload("image", padded(png(0), 4 * 1024 * 1024)), "what is there needs no room"


def test_too_large_is_refused_before_it_is_sent(seeing: Fleet) -> None:
    client = seeing.client(media=MediaSettings(inline_bytes=1000))
    with pytest.raises(InvalidRequest) as caught:
        client.submit("Look", images=[padded(png(1), 1001)])
    assert caught.value.code == "media_too_large"
    assert "folder" in caught.value.hint


def test_who_waits_for_an_upload_may_leave(seeing: Fleet) -> None:
    from tokenfleet import AsyncClient

    image = padded(png(30), 2_000_000)

    async def leave() -> None:
        async with AsyncClient(seeing.redis.url, fleet=seeing.redis.fleet, model=MODEL) as client:
            first, second = (asyncio.create_task(client.upload("image", image)) for _ in range(2))
            while not client.media._uploads:
                await asyncio.sleep(0)
            first.cancel()
            assert (await second).type == "image"
            third = asyncio.create_task(client.upload("image", padded(png(31), 2_000_000)))
            while not client.media._uploads:
                await asyncio.sleep(0)
            third.cancel()

    asyncio.run(leave())
    assert len(keys(seeing, f"media:{entry(image)}")) == 1


def test_an_upload_may_be_repeated(seeing: Fleet) -> None:
    """A reply that is lost with its connection: the same call again stores nothing twice."""
    from tokenfleet.wire import scripts

    client, prefix = seeing.client(), f"tokenfleet:{seeing.redis.fleet}:"
    run = lambda *args: client.thread.run(scripts.run(client.aio.ledger.client, "media_put", prefix, *args))  # noqa: E731
    name = entry(b"x")
    assert run(name, 60_000, 1, "file", "a") == [b"stored"]
    assert run(name, 60_000, 1, "file", "a") == [b"stored"]
    assert run(name, 60_000, 1, "file", "b") == [b"exists"]
    assert run(name, 60_000, 1, "data", "x") == [b"exists"]
    with seeing.redis.client(decode_responses=True) as redis:
        assert redis.hgetall(f"{prefix}media:{name}") == {"file": "a", "bytes": "1"}
        assert 0 < redis.pttl(f"{prefix}media:{name}") <= 60_000


def test_the_command_line_sends_files(seeing: Fleet, tmp_path: Path) -> None:
    from tests.shells import Shell

    shell = Shell(TOKENFLEET_REDIS_URL=seeing.redis.url, TOKENFLEET_FLEET=seeing.redis.fleet)
    image, sound = tmp_path / "a.png", tmp_path / "a.wav"
    image.write_bytes(png(1))
    sound.write_bytes(wav(1))
    greedy = ("--temperature", "0", "--max_new_tokens", "12")
    expected = text_of(seeing.client(), "So?", images=[image], audios=[sound])
    job_id = shell("submit", "--image", str(image), "--audio", str(sound), *greedy, "So?").strip()
    assert shell("watch", job_id).rstrip("\n") == expected.rstrip("\n")
    # In a chat they go with the first message; the second turn has them still.
    said = shell("chat", "--image", str(image), "--audio", str(sound), *greedy, stdin="So?\nAnd?\n")
    assert said.startswith(expected)
    turns = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": expected}, user("And?")]
    assert said.rstrip("\n").endswith(text_of(seeing.client(), turns, images=[image], audios=[sound]).rstrip("\n"))
    assert "error [invalid_media]" in shell.error("submit", "--image", "/no/such/file", "So?")
    assert "error [media_mismatch]" in shell.error("submit", "--image", str(image), "<image><image>")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_celery_users_name_media_by_reference(seeing: Fleet) -> None:
    from celery import Celery

    from tokenfleet import chat

    client, url = seeing.client(), seeing.redis.celery_url
    app = Celery("theirs", broker=url, backend=url)
    part = client.upload("image", png(20))
    where = {"model": MODEL, "fleet": seeing.redis.fleet, "app": app}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "So?"}]}]
    answer = chat.s(messages, **where, **GREEDY).apply_async().get(timeout=30)
    assert answer["choices"][0]["text"] == text_of(client, "So?", images=[png(20)])
    data_url = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(png()).decode()}}
    for inline, named in (([user("So?")], {"images": [png()]}), ([{"role": "user", "content": [data_url]}], {})):
        with pytest.raises(InvalidRequest) as caught:
            chat.s(inline, **where, **named)
        assert caught.value.code == "unsupported_media"
    app.close()


def test_a_local_fleet_has_room_for_large_media() -> None:
    from tokenfleet import ChatModel

    large, args = padded(png(21), 9 * 1024 * 1024), {"token_ms": 0, "modalities": ALL_KINDS}
    with ChatModel({"infer_backend": "scripted", "engine_args": args, **GREEDY}) as model:
        small = model.chat("So?", images=[png(21)])[0].response_text
        assert model.chat("So?", images=[large])[0].response_text != small
        folder = model.client.aio.media.settings.folder
        assert folder is not None
        assert [path.stat().st_size for path in folder.rglob("*") if path.is_file()] == [len(large)]
        assert folder.stat().st_mode & 0o007 == 0
    assert not folder.exists(), "a private fleet leaves nothing"
