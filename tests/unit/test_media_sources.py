"""Media out of messages and arguments: where they stand, what is refused, and that nothing of the caller's changes."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.media import mp4, padded, png, wav
from tokenfleet.producer.media import has_media, take
from tokenfleet.producer.media_kinds import format_of
from tokenfleet.wire.chat import ChatRequest, MediaPart, Message, TextPart
from tokenfleet.wire.errors import InvalidRequest
from tokenfleet.wire.media import MediaSettings

LIMITS = MediaSettings()


def ref(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def shown(messages: Any, limits: MediaSettings = LIMITS, **named: Any) -> list[str]:
    """Each message's content as one line: texts, and ``{kind:first digits of the hash}``."""
    taken = take(messages, named, limits)
    request = ChatRequest.model_validate({"messages": taken.messages})
    assert {part.ref for part in request.media} >= set(taken.media)
    assert all(hashlib.sha256(data).hexdigest() == name for name, data in taken.media.items())
    lines = []
    for message in request.messages:
        parts = (TextPart(text=message.content),) if isinstance(message.content, str) else message.content or ()
        lines.append("".join(p.text if isinstance(p, TextPart) else f"{{{p.type}:{p.ref[:6]}}}" for p in parts))
    return lines


def refused(messages: Any, limits: MediaSettings = LIMITS, **named: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        take(messages, named, limits)
    assert caught.value.http_status == 400
    return caught.value.code


A, B, W, V = png(1), png(2), wav(1), mp4(1)
IMAGE_A, IMAGE_B = f"{{image:{ref(A)[:6]}}}", f"{{image:{ref(B)[:6]}}}"
AUDIO, VIDEO = f"{{audio:{ref(W)[:6]}}}", f"{{video:{ref(V)[:6]}}}"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("messages", "named", "lines"),
    [
        ("What is it?", {"images": [A]}, [f"{IMAGE_A}What is it?"]),
        ("What is it?", {"images": [A, B]}, [f"{IMAGE_A}{IMAGE_B}What is it?"]),
        # LLaMA-Factory puts images first, then videos before them, then audios before these.
        ("So?", {"images": [A], "videos": [V], "audios": [W]}, [f"{AUDIO}{VIDEO}{IMAGE_A}So?"]),
        ("<image> or <image>?", {"images": [A, B]}, [f"{IMAGE_A} or {IMAGE_B}?"]),
        ("<image>, <audio>", {"audios": [W], "images": [A]}, [f"{IMAGE_A}, {AUDIO}"]),
        ("<image>", {"images": A, "videos": V}, [f"{VIDEO}{IMAGE_A}"]),
        ([user("<image>"), {"role": "assistant", "content": "Hm."}, user("and <image>?")], {"images": [A, B]},
         [IMAGE_A, "Hm.", f"and {IMAGE_B}?"]),
        ([{"role": "system", "content": "Be kind."}, user("Hi")], {"images": [A]}, ["Be kind.", f"{IMAGE_A}Hi"]),
        ([user([{"type": "text", "text": "a <image> b"}])], {"images": [A]}, [f"a {IMAGE_A} b"]),
        ([user([{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": url(A)}}])], {},
         [f"x{IMAGE_A}"]),
        ([user([{"type": "image_url", "image_url": url(A)}, {"type": "image_url", "image_url": {"url": url(B)}}])], {},
         [f"{IMAGE_A}{IMAGE_B}"]),
        ([user([{"type": "input_audio", "input_audio": {"data": base64.b64encode(W).decode(), "format": "wav"}}])], {},
         [AUDIO]),
        ([user([{"type": "video_url", "video_url": {"url": url(V, "video/mp4")}}])], {}, [VIDEO]),
        ([user([{"type": "file", "file": {"file_data": url(V, "video/mp4"), "filename": "v.mp4"}}])], {}, [VIDEO]),
        ([user([{"type": "image", "image": A}, "text"])], {}, [f"{IMAGE_A}text"]),
        ([user([{"type": "image", "ref": ref(A)}])], {}, [IMAGE_A]),
        ([Message(role="user", content=(TextPart(text="t"), MediaPart(type="image", ref=ref(A))))], {},
         [f"t{IMAGE_A}"]),
        # An image elsewhere is no placeholder's; one that the caller marked twice, by part and word, is one image.
        ([user([{"type": "image", "image": A}]), user("<image>")], {"images": [B]}, [IMAGE_A, IMAGE_B]),
        ([user([{"type": "image", "image": A}, "<image>"])], {}, [f"{IMAGE_A}<image>"]),
        ("Nothing of <video> is given.", {"images": [A]}, [f"{IMAGE_A}Nothing of <video> is given."]),
    ],
)  # fmt: skip
def test_media_stand_where_the_caller_put_them(messages: Any, named: dict[str, Any], lines: list[str]) -> None:
    before = copy.deepcopy((messages, named))
    assert has_media(messages, named)
    assert shown(messages, **named) == lines
    assert (messages, named) == before, "the caller's own objects were changed"


@pytest.mark.parametrize(
    ("messages", "named", "code"),
    [
        ("<image>", {"images": [A, B]}, "media_mismatch"),
        ("<image><image>", {"images": [A]}, "media_mismatch"),
        ([user([{"type": "image", "image": A}, "<image><image>"])], {}, "media_mismatch"),
        ((), {"images": [A], "prompt": "x"}, "media_mismatch"),
        ("x", {"images": [W]}, "unsupported_media"),
        ("x", {"audios": [A]}, "unsupported_media"),
        ("x", {"images": [b"hello"]}, "unsupported_media"),
        ("x", {"images": [b""]}, "invalid_media"),
        ("x", {"images": [7]}, "unsupported_media"),
        ("x", {"videos": [[[A]]]}, "unsupported_media"),
        ("x", {"images": ["/no/such/file"]}, "invalid_media"),
        ("x", {"images": ["/dev"]}, "invalid_media"),
        ("x", {"images": ["a\0b"]}, "invalid_media"),
        ("x", {"images": ["http://127.0.0.1/x.png"]}, "url_refused"),
        ("x", {"images": ["data:image/png;base64,@@@"]}, "invalid_media"),
        ("x", {"images": ["data:image/png;base64"]}, "invalid_media"),
        ("x", {"images": [io.StringIO("text")]}, "invalid_media"),
        ([user([{"type": "image_url", "image_url": {"url": "https://x/y.png"}}])], {}, "url_refused"),
        # A stranger's text is never a path, even to a file that is there and is an image.
        ([user([{"type": "image_url", "image_url": {"url": "/etc/passwd"}}])], {}, "invalid_media"),
        ([user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}])], {}, "invalid_media"),
        ([user([{"type": "image", "image": {"path": "/etc/passwd"}}])], {}, "unsupported_media"),
        ([user([{"type": "image_url", "image_url": {}}])], {}, "unsupported_media"),
        ([user([{"type": "image_url"}])], {}, "invalid_media"),
        ([user([{"type": "input_audio", "input_audio": {"format": "wav"}}])], {}, "invalid_media"),
        ([user([{"type": "input_audio", "input_audio": {"data": "!"}}])], {}, "invalid_media"),
        ([user([{"type": "file", "file": {"file_data": url(b"%PDF-1.7", "application/pdf")}}])], {},
         "unsupported_media"),
        ([user([{"type": "file", "file": {"file_id": "file-1"}}])], {}, "unsupported_media"),
        ([7], {"images": [A]}, "invalid_request"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_a_typed_error(messages: Any, named: dict[str, Any], code: str) -> None:
    assert refused(messages, **named) == code


def test_sources_of_every_form_are_the_same_medium(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(A)
    forms = [A, bytearray(A), memoryview(A), str(path), path, url(A), io.BytesIO(A), {"bytes": A}, {"path": str(path)}]
    for form in forms:
        assert shown("x", images=[form]) == [f"{IMAGE_A}x"], form
    with path.open("rb") as file:
        assert shown("x", images=[file]) == [f"{IMAGE_A}x"]


def test_a_pil_image_is_taken_by_what_it_can_do() -> None:
    class Picture:  # as PIL.Image.Image does; Pillow need not be here
        mode = "CMYK"

        def convert(self, mode: str) -> Picture:
            picture = Picture()
            picture.mode = mode
            return picture

        def save(self, file: Any, form: str) -> None:
            assert (self.mode, form) == ("RGB", "PNG")
            file.write(A)

    assert shown("x", images=[Picture()]) == [f"{IMAGE_A}x"]


def test_arrays_of_samples_become_wav_files() -> None:
    import struct

    samples = np.linspace(-1, 1, 100, dtype=np.float32)
    for form, rate in ((samples, 16_000), ((samples, 8_000), 8_000), ((samples.astype("f8"), 48_000), 48_000)):
        [data] = take("x", {"audios": [form]}, LIMITS).media.values()
        assert data[:4] == b"RIFF"
        assert struct.unpack("<I", data[4:8])[0] == len(data) - 8
        assert struct.unpack("<HHI", data[20:28]) == (3, 1, rate)
        assert np.array_equal(np.frombuffer(data[-400:], "<f4"), samples)
    [data] = take("x", {"audios": (np.array([-32768, 0, 16384], np.int16), 16_000)}, LIMITS).media.values()
    assert np.frombuffer(data[-12:], "<f4").tolist() == [-1.0, 0.0, 0.5]


def test_sizes_are_bounded_before_anything_is_decoded(tmp_path: Path) -> None:
    small = MediaSettings(inline_bytes=1000, max_request_bytes=1500, max_items=3)
    large = padded(A, 1001)
    (tmp_path / "large.png").write_bytes(large)
    for form in (
        large,
        url(large),
        str(tmp_path / "large.png"),
        io.BytesIO(large),
        "data:image/png;base64," + "!" * 2000,
    ):
        assert refused("x", small, images=[form]) == "media_too_large"
    assert shown("x", small, images=[padded(A, 1000)])
    assert refused("x", small, images=[padded(A, 900), padded(B, 900)]) == "media_too_large"
    assert shown("x", small, images=[padded(A, 900)] * 3), "the same bytes count once"
    assert refused("x", small, images=[A] * 4) == "media_too_large"
    # Without end: it is read no further than allowed.
    assert refused("x", small, images=["/dev/zero"]) == "media_too_large"


def test_text_has_no_media() -> None:
    for messages in (
        "",
        "Hi <image>",
        [user("Hi <image>")],
        [user([{"type": "text", "text": "x"}])],
        [Message(role="user", content="x")],
    ):
        assert not has_media(messages, {"images": None, "videos": [], "temperature": 1})


def test_formats_are_told_by_their_first_bytes() -> None:
    assert [format_of("image", data) for data in (A, b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF....WEBPVP8 ", W, V)] == [
        "PNG", "JPEG", "GIF", "WebP", None, None,
    ]  # fmt: skip
    sounds = (W, b"ID3\4", b"fLaC", b"OggS", b"\xff\xfb\x90", b"FORM....AIFF", A)
    assert [format_of("audio", data) for data in sounds] == [
        "WAV", "MP3", "FLAC", "Ogg", "MP3", "AIFF", None,
    ]  # fmt: skip
    assert [format_of("video", data) for data in (V, b"\x1a\x45\xdf\xa3", b"RIFF....AVI ", W)] == [
        "MP4", "WebM", "AVI", None,
    ]  # fmt: skip


def test_a_producer_needs_no_library_of_media() -> None:
    import subprocess

    heavy = "[n for n in ('PIL', 'numpy', 'torch', 'fastapi') if n in sys.modules]"
    code = f"import sys, tokenfleet.producer.aio; print({heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
