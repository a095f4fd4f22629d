"""A job with media survives its worker: the next one fetches them again; after the end nothing of them is left."""

from __future__ import annotations

import json
import signal
from itertools import islice

import pytest

from tests.faults.test_leaks import keys_of
from tests.faults.test_real_model import PACE_S, paced
from tests.fleets import Fleet, wait_until
from tests.media import padded, png, wav
from tokenfleet.wire.errors import MediaGone
from tokenfleet.wire.events import AnyEvent, Delta, Finished
from tokenfleet.wire.media import MediaSettings

TOKENS = 300
OPTIONS = {"modalities": ["text", "image", "audio"], "token_ms": 5.0}


def text_of(events: list[AnyEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def media_keys(fleet: Fleet) -> list[str]:
    return [name for name in keys_of(fleet) if ":media" in name]


def test_a_stream_with_media_goes_on_when_its_worker_is_killed(fleet: Fleet) -> None:
    folder = fleet.folder / "media"
    env = {"TOKENFLEET_MEDIA_FOLDER": str(folder)}
    first = fleet.start_worker(env=env, **{**OPTIONS, "token_ms": 60.0})
    client = fleet.client(media=MediaSettings(folder=folder, inline_bytes=1000))
    media = {"images": [png(1), padded(png(2), 5000)], "audios": [wav(3, samples=100)]}
    asked = {"do_sample": False, "max_new_tokens": TOKENS, "retention_s": 2.0, **media}
    job = client.submit("<image>, <image>: <audio>?", **asked)
    with job.stream() as stream:
        events = list(islice(stream, 20))
        second = fleet.start_worker(env=env, wait=False, **OPTIONS)
        first.kill_group(signal.SIGKILL)
        cut = len(text_of(events))
        events += list(stream)
    undisturbed = client.chat("<image>, <image>: <audio>?", **asked).text
    assert undisturbed != client.chat("<image>, <image>: <audio>?", **{**asked, "images": [png(2), png(1)]}).text
    assert 0 < cut < len(undisturbed)
    assert isinstance(events[-1], Finished)
    assert events[-1].usage.attempts == 2, "not mid-stream: this run would prove nothing"
    assert text_of(events) == undisturbed
    assert [line for line in second.record if line["event"] == "prefill" and line["delivered_tokens"] > 0]
    wait_until(lambda: not media_keys(fleet), 20, "no key of a medium is left")
    client.thread.run(client.aio.media.sweep(grace_s=0))
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_a_takeover_that_finds_media_gone_ends_the_job_with_a_reason(fleet: Fleet) -> None:
    first = fleet.start_worker(**OPTIONS)
    client = fleet.client()
    job = client.submit("Look", images=[png(1)], max_new_tokens=5000, do_sample=False)
    with job.stream() as stream:
        list(islice(stream, 10))
        with fleet.redis.client() as redis:
            redis.delete(*media_keys(fleet))
        fleet.start_worker(wait=False, **OPTIONS)
        first.kill_group(signal.SIGKILL)
        with pytest.raises(MediaGone):
            list(stream.text())
    status = job.status()
    assert (status.state, status.attempts) == ("failed", 2)
    assert client.chat("Hi", images=[png(1)], max_new_tokens=5).text, (
        "another job with the same image is none the worse"
    )


@pytest.mark.slow
def test_a_real_models_answer_about_images_and_a_video_goes_on_where_it_was_cut(fleet: Fleet) -> None:
    """Qwen2-VL's positions are not its tokens' places: the next worker must find them again from the same bytes."""
    pytest.importorskip("torch")
    pytest.importorskip("av")
    from tests.contract import small_multimodal
    from tests.media_files import image_file, video_file

    small_multimodal.save("qwen2_vl", fleet.folder / "model")
    arguments = {"model_name_or_path": str(fleet.folder / "model"), "infer_dtype": "float32", "threads": 1}
    env = {"TOKENFLEET_ENGINE": "transformers", "TOKENFLEET_ENGINE_ARGS": json.dumps(arguments)}
    first = fleet.start_worker(env={**env, **paced(PACE_S)})
    client = fleet.client()
    media = {"images": [image_file(1, (120, 80)), image_file(2)], "videos": [video_file(3)]}
    asked = {"do_sample": False, "ignore_eos": True, "max_new_tokens": TOKENS}
    question = "<image>, <image>, <video>?"
    job = client.submit(question, **asked, **media)
    with job.stream() as stream:
        events = list(islice(stream, 20))
        fleet.start_worker(env=env, wait=False)
        first.kill_group(signal.SIGKILL)
        events += list(stream)
    undisturbed = client.chat(question, **asked, **media)
    other = client.chat(question, **{**asked, "max_new_tokens": 50}, **{**media, "videos": [video_file(4)]})
    ids = undisturbed.choices[0].ids
    assert len(ids) == TOKENS
    assert other.choices[0].ids != ids[:50]
    assert undisturbed.usage.prompt_tokens > 40, "the media's tokens count"
    assert isinstance(events[-1], Finished)
    assert events[-1].usage.attempts == 2, "not mid-stream: this run would prove nothing"
    assert [token for event in events if isinstance(event, Delta) for token in event.ids] == list(ids)
