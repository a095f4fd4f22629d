"""One image: refused by its header or decoded, then scaled as LLaMA-Factory scales it."""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import TYPE_CHECKING

from tokenfleet.engines.media.failures import invalid, too_large
from tokenfleet.engines.media.settings import MediaSettings
from tokenfleet.wire.errors import ConfigurationError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error)
"""What Pillow's readers raise for files that are not what they should be."""
_QWEN_LEAST_SIDE, _QWEN_LARGEST_RATIO, _QWEN_NEW_RATIO = 28, 200, 180


def decode_image(data: bytes, settings: MediaSettings, *, is_qwen: bool = False) -> Image:
    """An RGB image. ``is_qwen``: with the least size and the largest ratio of sides that Qwen's processors take.

    Raises `InvalidRequest`: ``media_too_large`` before anything is decoded, else ``invalid_media``."""
    try:
        import PIL
        from PIL import Image as pillow  # noqa: N813
    except ImportError as error:
        raise ConfigurationError(
            f"A worker needs Pillow to read images, which can't be imported ({error}).",
            code="missing_extra",
            hint="Install it: pip install 'tokenfleet[hf]'",
        ) from error
    try:
        with pillow.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.size, settings)
            # A JPEG with a preview or a depth map behind it is one picture all the same.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise invalid("The image is animated.", "Send one picture, or the animation as a video.")
            image.load()
            _check_size(image.size, settings)
            return resized(image, settings.image_max_pixels, settings.image_min_pixels, is_qwen=is_qwen)
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise _too_many_pixels("far more", settings) from error
    except PIL.UnidentifiedImageError as error:
        raise invalid("The image is of no format that is read.", f"Send {', '.join(FORMATS)}.") from error
    except _BROKEN as error:
        raise invalid(f"The image can't be decoded: {type(error).__name__}.", "Is the file whole?") from error


def _check_size(size: tuple[int, int], settings: MediaSettings) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise invalid("The image has no pixels.")
    if width * height > settings.media_max_pixels:
        raise _too_many_pixels(f"{width} × {height}", settings)


def _too_many_pixels(pixels: str, settings: MediaSettings) -> Exception:
    return too_large(
        f"The image has {pixels} pixels; {settings.media_max_pixels} in all are read.",
        f"Scale it down: the model sees {settings.image_max_pixels} at most.",
    )


def resized(image: Image, max_pixels: int, min_pixels: int, *, is_qwen: bool) -> Image:
    """LLaMA-Factory's ``_preprocess_image``: first scaled in its own mode, then made RGB."""
    if image.width * image.height > max_pixels:
        image = _scaled(image, math.sqrt(max_pixels / (image.width * image.height)))
    if image.width * image.height < min_pixels:
        image = _scaled(image, math.sqrt(min_pixels / (image.width * image.height)))
    image = image.convert("RGB")
    if not is_qwen:
        return image
    if min(image.size) < _QWEN_LEAST_SIDE:
        image = image.resize((max(image.width, _QWEN_LEAST_SIDE), max(image.height, _QWEN_LEAST_SIDE)))
    if image.width / image.height > _QWEN_LARGEST_RATIO:
        image = image.resize((image.height * _QWEN_NEW_RATIO, image.height))
    if image.height / image.width > _QWEN_LARGEST_RATIO:
        image = image.resize((image.width, image.width * _QWEN_NEW_RATIO))
    return image


def _scaled(image: Image, factor: float) -> Image:
    return image.resize((max(1, int(image.width * factor)), max(1, int(image.height * factor))))
