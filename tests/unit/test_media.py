"""Decoding what anybody may send: everything is decoded as LLaMA-Factory would, or refused, in bounded memory."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib
from functools import cache

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("PIL")
av = pytest.importorskip("av")


from tests.media_files import audio_file, image_file, picture, video_file  # noqa: E402
from tokenfleet.engines.base import Media  # noqa: E402
from tokenfleet.engines.media import MediaSettings, decode  # noqa: E402
from tokenfleet.engines.media.videos import sample_indices  # noqa: E402
from tokenfleet.wire.errors import InvalidRequest  # noqa: E402

pytestmark = pytest.mark.unit


def decoded(kind, data, **settings):
    found = decode([Media(kind, data)], MediaSettings(**settings))
    return {"image": found.images, "video": found.videos, "audio": found.audios}[kind][0]


def code_of(kind, data, **settings):
    with pytest.raises(InvalidRequest) as caught:
        decoded(kind, data, **settings)
    return caught.value.code


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "BMP", "WEBP", "GIF", "JPEG"])
def test_images_of_all_formats_are_read(form):
    image = decoded("image", image_file(3, form=form, **({"lossless": True} if form == "WEBP" else {})))
    assert (image.mode, image.size) == ("RGB", (60, 44))
    if form not in {"GIF", "JPEG"}:
        assert list(image.get_flattened_data()) == list(picture(3).get_flattened_data())


def test_images_are_scaled_as_llama_factory_scales_them():
    big = picture(1, (300, 200))
    image = decoded("image", encoded(big), image_max_pixels=10_000)
    # sqrt(10000 / 60000) of each side, cut to whole pixels, bicubic
    assert image.size == (122, 81)
    assert list(image.get_flattened_data()) == list(big.resize((122, 81)).get_flattened_data())
    assert decoded("image", encoded(picture(1, (10, 5)))).size == (45, 22)  # 32 * 32 pixels at least
    grey = decoded("image", encoded(big.convert("LA")))
    assert (grey.mode, grey.size) == ("RGB", (300, 200))


def test_qwens_images_have_a_least_side_and_a_largest_ratio():
    def size(width, height):
        return (
            decode([Media("image", encoded(picture(1, (width, height))))], MediaSettings(), is_qwen=True).images[0].size
        )

    assert size(200, 20) == (200, 28)
    assert size(10_000, 40) == (40 * 180, 40)


def encoded(image, form="PNG"):
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def png(width, height, *chunks, data=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunk(*each) for each in chunks)
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def zeros(megabytes):
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


@cache
def hostile_images():
    animated = io.BytesIO()
    frames = [picture(seed) for seed in range(3)]
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    webp = b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + b"\xfe\x3f\0" * 2
    bomb = zeros(200)
    return {
        "huge header": (png(100_000, 100_000), "media_too_large"),
        "beyond any format": (png(2**31 - 1, 2**31 - 1), "media_too_large"),
        "a real bomb": (png(14_000, 14_000, data=bomb), "media_too_large"),
        "text that unpacks to 200 MB": (png(8, 8, (b"zTXt", b"key\0\0" + bomb), data=zlib.compress(bytes(200))), None),
        "a profile that unpacks to 200 MB": (
            png(8, 8, (b"iCCP", b"n\0\0" + bomb), data=zlib.compress(bytes(200))),
            None,
        ),
        "jpeg header": (b"\xff\xd8\xff\xc0\0\x11\x08\xff\xdc\xff\xdc\x03\x01\x22\0\x02\x11\x01\x03\x11\x01", None),
        "bmp header": (
            b"BM" + bytes(8) + struct.pack("<IIiiHHI", 54, 40, 60_000, 60_000, 1, 24, 0) + bytes(24),
            "media_too_large",
        ),
        "gif header": (b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\x80\0\0" + bytes(6) + b",", None),
        "webp header": (webp, None),
        "animated gif": (animated.getvalue(), "invalid_media"),
        "half a png": (image_file(1)[:150], "invalid_media"),
        "half a jpeg": (image_file(1, (400, 400), "JPEG")[:-900], "invalid_media"),
        "text": (b"no image at all", "invalid_media"),
        "nothing": (b"", "invalid_media"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "invalid_media"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "invalid_media"),
        "tiff": (encoded(picture(1), "TIFF"), "invalid_media"),
        "a video": (video_file(1), "invalid_media"),
    }


@pytest.mark.parametrize("name", list(hostile_images()))
def test_hostile_images_are_refused(name):
    data, code = hostile_images()[name]
    found = code_of("image", data)
    assert found == code if code else found in {"invalid_media", "media_too_large"}


def test_refusing_takes_little_memory():
    script = """
import resource
from tests.unit.test_media import *
decode([Media("image", image_file(1)), Media("video", video_file(1))], MediaSettings())
files = hostile_images()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, (data, _) in files.items():
    try:
        decode([Media("image", data)], MediaSettings())
    except InvalidRequest:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=100)
    assert int(done.stdout) < 100  # MB


def test_bytes_are_counted_before_anything_is_read():
    assert code_of("image", image_file(1), media_max_bytes=100) == "media_too_large"


# -- videos -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.1, 1.0, 7.3, 60.0, 500.0])
def test_frames_are_sampled_as_llama_factory_samples_them(seconds):
    for total in (1, 2, 3, 10, 77, 128, 129, 1000, 9999):
        count = min(total, 128, max(1, int(seconds * 2.0)))
        expected = np.linspace(0, total - 1, count).astype(np.int32).tolist()
        assert sample_indices(total, seconds, MediaSettings()) == expected
    assert sample_indices(0, None, MediaSettings(video_maxlen=5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("form", ["mpegts", "mpeg", "matroska"])
def test_videos_whose_headers_count_no_frames_are_read_from_the_start(form):
    video = decoded("video", video_file(2, frames=50, form=form, codec="mpeg2video", rate=25), video_maxlen=20)
    assert video.indices == tuple(range(20))


@pytest.mark.parametrize(("form", "codec"), [("mp4", "mpeg4"), ("mp4", "h264"), ("avi", "mpeg4"), ("webm", "vp9")])
def test_videos_are_read(form, codec):
    video = decoded("video", video_file(2, frames=50, form=form, codec=codec), video_maxlen=20)
    assert video.indices == ((0, 5, 10, 16, 21, 27, 32, 38, 43, 49) if form != "webm" else tuple(range(20)))
    assert (video.fps, video.source_fps) == (2.0, 10.0)
    assert all((frame.mode, frame.size) == ("RGB", (64, 48)) for frame in video.frames)
    shown = np.asarray(video.frames[3], dtype=float)
    meant = np.asarray(picture(2000 + video.indices[3], (64, 48)), dtype=float)
    other = np.asarray(picture(2000 + video.indices[3] + 1, (64, 48)), dtype=float)
    assert abs(shown - meant).mean() < abs(shown - other).mean() / 2


def test_qwens_videos_have_an_even_number_of_frames():
    video = decode([Media("video", video_file(1, frames=30))], MediaSettings(), is_qwen=True).videos[0]
    assert len(video.frames) == len(video.indices) == 6
    video = decode([Media("video", video_file(1, frames=25))], MediaSettings(), is_qwen=True).videos[0]
    assert video.indices == (0, 6, 12, 18, 24, 24)
    video = decode([Media("video", video_file(1, frames=7, form="matroska"))], MediaSettings(), is_qwen=True).videos[0]
    assert (len(video.frames), video.duration_s) == (8, 3.5)  # of those that were taken, at 2 a second


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'/>",
        b"v=0\r\nc=IN IP4 127.0.0.1\r\nm=video 9 RTP/AVP 96\r\n",
        b"",
        b"\0\0\0\x18ftypmp42",
        video_file(1)[:700],
        image_file(1),
        audio_file(1),
    ],
    ids=["hls", "concat", "dash", "sdp", "nothing", "header", "half", "image", "sound"],
)
def test_what_is_no_video_is_refused(data):
    assert code_of("video", data) == "invalid_media"


@pytest.mark.parametrize(
    "settings",
    [{"media_max_pixels": 3000}, {"media_max_seconds": 1.9}, {"media_max_frames": 10}, {"media_timeout_s": 1e-6}],
)
def test_too_much_video_is_refused(settings):
    assert code_of("video", video_file(1, frames=20), **settings) == "media_too_large"


# -- audios -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "codec", "rate"),
    [("wav", "pcm_s16le", 16000), ("flac", "flac", 16000), ("mp3", "mp3", 16000), ("ogg", "libopus", 48000),
     ("wav", "pcm_s16le", 44100), ("adts", "aac", 16000)],
)  # fmt: skip
def test_audios_are_read_and_resampled(form, codec, rate):
    sound = decoded("audio", audio_file(5, seconds=1.0, rate=rate, form=form, codec=codec))
    assert sound.dtype == np.float32
    assert abs(len(sound) - 16000) < 2200  # lossy codecs pad
    exact = decoded("audio", audio_file(5, seconds=1.0))
    loudest = [np.sort(np.argsort(abs(np.fft.rfft(each, 16000)))[-3:]) for each in (sound, exact)]
    assert abs(loudest[0] - loudest[1]).max() <= 2  # the same three tones


def test_channels_are_averaged():
    left, right = np.full(1600, 8000, np.int16), np.full(1600, -2000, np.int16)
    frame = av.AudioFrame.from_ndarray(np.stack([left, right], 1).reshape(1, -1), format="s16", layout="stereo")
    frame.sample_rate = 16000
    out = io.BytesIO()
    with av.open(out, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="stereo")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert decoded("audio", out.getvalue()).tolist() == [3000 / 32768] * 1600


def test_frames_that_change_their_size_are_refused():
    parts = [video_file(seed, 25, size, 25, "mpegts", "mpeg2video") for seed, size in ((1, (64, 48)), (2, (32, 96)))]
    assert decoded("video", parts[0]).frames
    assert code_of("video", b"".join(parts)) == "invalid_media"


@pytest.mark.parametrize("rate", [22050, 44100])
def test_a_sound_whose_rate_changes_on_the_way_is_heard_to_its_end(rate):
    parts = [audio_file(seed, 1.0, rate=each, form="adts", codec="aac") for seed, each in ((1, 48000), (2, rate))]
    sound = decoded("audio", b"".join(parts))
    assert abs(len(sound) - 32000) < 4400
    alone = decoded("audio", parts[1])
    loudest = [np.sort(np.argsort(abs(np.fft.rfft(each[-12000:])))[-3:]) for each in (sound, alone)]
    assert abs(loudest[0] - loudest[1]).max() <= 2


def test_what_is_no_audio_or_too_much_of_it_is_refused():
    for data in (b"", b"RIFF\xff\xff\xff\xffWAVEfmt ", image_file(1), video_file(1), b"\xff\xfb" + bytes(50)):
        assert code_of("audio", data) == "invalid_media"
    assert code_of("audio", audio_file(1, seconds=2.0), media_max_seconds=1.0) == "media_too_large"
    assert (
        code_of("audio", audio_file(1, seconds=2.0, form="adts", codec="aac"), media_max_seconds=1.0)
        == "media_too_large"
    )


# -- anything ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_damaged_files_are_decoded_or_refused(kind):
    rng = random.Random(11)
    whole = {
        "image": [image_file(1, form=form) for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP")],
        "video": [video_file(1, frames=6), video_file(1, frames=6, form="matroska")],
        "audio": [
            audio_file(1, 0.1, form=f, codec=c) for f, c in (("wav", "pcm_s16le"), ("flac", "flac"), ("mp3", "mp3"))
        ],
    }[kind]
    outcomes = []
    for data in whole:
        for _ in range(60):
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 8)):
                damaged[rng.randrange(min(len(damaged), rng.choice([40, 400, 10**6])))] = rng.randrange(256)
            if rng.random() < 0.3:
                del damaged[rng.randrange(len(damaged)) :]
            try:
                decoded(kind, bytes(damaged))
                outcomes.append("read")
            except InvalidRequest as error:
                outcomes.append(error.code)
    assert {"read", "invalid_media"} <= set(outcomes) <= {"read", "invalid_media", "media_too_large"}


def test_text_goes_on_after_a_videos_last_frame() -> None:
    torch = pytest.importorskip("torch")
    from tokenfleet.engines.media.positions import go_on_after_videos

    # Two texts, three frames of one by two, two texts, an image of one by two, a text: as transformers 5 and as Qwen.
    types = torch.tensor([0, 0, 2, 2, 2, 2, 2, 2, 0, 0, 1, 1, 0])
    frames, image = [[2, 2, 3, 3, 4, 4], [2] * 6, [2, 3] * 3], [[6, 6], [6, 6], [6, 7]]
    given = [[0, 1, *row, 4, 5, *seen, 8] for row, seen in zip(frames, image, strict=True)]
    positions = torch.tensor(given)
    go_on_after_videos(positions, types)
    assert positions.tolist() == [
        [0, 1, *row, 5, 6, *[number + 1 for number in seen], 9] for row, seen in zip(frames, image, strict=True)
    ]
    again = positions.clone()
    go_on_after_videos(again, types)
    assert torch.equal(again, positions)


def test_a_videos_steps_stand_as_far_apart_as_they_are_in_time() -> None:
    torch = pytest.importorskip("torch")
    from tokenfleet.engines.media.positions import space_frames

    # A text, three steps of one by two, a text, an image, two steps of one by one: as transformers 5.17 has them.
    types = torch.tensor([0, 2, 2, 2, 2, 2, 2, 0, 1, 2, 2])
    positions = torch.tensor(
        [[0, 1, 1, 1, 1, 1, 1, 3, 4, 5, 5], [0, 1, 1, 1, 1, 1, 1, 3, 4, 5, 5], [0, 1, 2, 1, 2, 1, 2, 3, 4, 5, 5]]
    )
    rest = positions[1:].clone()
    space_frames(positions, types, [[3, 2, 4], [2, 2, 2]], [0.375, 0.5], 4)
    assert positions[0].tolist() == [0, 1, 1, 2, 2, 4, 4, 3, 4, 5, 7]
    assert torch.equal(positions[1:], rest)
