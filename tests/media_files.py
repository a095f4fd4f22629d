"""Small images, videos and audios, made on the spot; different for different seeds."""

from __future__ import annotations

import io

import numpy as np


def picture(seed: int, size=(60, 44)):
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


def image_file(seed: int, size=(60, 44), form="PNG", **options) -> bytes:
    out = io.BytesIO()
    picture(seed, size).save(out, form, **options)
    return out.getvalue()


def video_file(seed: int, frames=20, size=(64, 48), rate=10, form="mp4", codec="mpeg4") -> bytes:
    import av

    out = io.BytesIO()
    with av.open(out, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_image(picture(seed * 1000 + number, size))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def audio_file(seed: int, seconds=0.5, rate=16000, form="wav", codec="pcm_s16le") -> bytes:
    import av

    rng = np.random.default_rng(seed)
    times = np.arange(int(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * hz * times) for hz in rng.uniform(100, 4000, 3)) / 4
    frame = av.AudioFrame.from_ndarray((wave * 32000).astype(np.int16)[None], format="s16", layout="mono")
    frame.sample_rate = rate
    out = io.BytesIO()
    with av.open(out, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=rate)
        for made in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(made))
        container.mux(stream.encode(None))
    return out.getvalue()
