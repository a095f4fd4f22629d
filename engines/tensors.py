"""Files of safetensors by their headers: what is in them, without reading it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenfleet.wire.errors import ConfigurationError


def names_in(file: Path) -> list[str]:
    """Raises `ConfigurationError` for a file that is cut or none of safetensors."""
    with _opened(file) as tensors:
        return list(tensors.keys())


def shapes_in(file: Path) -> Iterator[tuple[str, list[int]]]:
    """Of all tensors of real numbers: packed ones have shapes of their own. Raises `ConfigurationError`."""
    with _opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118  # no mapping
            tensor = tensors.get_slice(name)
            if tensor.get_dtype().startswith(("F", "BF")):
                yield name, list(tensor.get_shape())


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(
            f"{file.name} in {file.parent.name!r} can't be read: {error}.", hint="Is the file whole?"
        ) from error
