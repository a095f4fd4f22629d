"""Media too large for Redis, as files of a folder that producers and workers share.

    <folder>/fleet-<fleet>/<scope>/<sha256>.<nonce>

A medium's hash in Redis names its file; nothing else makes a file valid. So each upload writes a file of its own, whole
or not at all, and whoever sweeps may delete what is not named, without asking who writes. No part of a path comes
from a user: scope and nonce are hex of ours, and what Redis says is checked.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterable
from pathlib import Path

_NAME = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{16}")
_SCOPE = re.compile(r"[0-9a-f]{16}")
_BATCH = 200

Named = tuple[str, str]
"""(``<scope>:<sha256>``, file name)"""


class MediaFolder:
    """Methods block; they raise `OSError` where the folder can't be written to."""

    def __init__(self, folder: Path, fleet: str) -> None:
        self._folder = folder / f"fleet-{fleet}"  # a fleet may be called ".."

    def write(self, entry: str, data: bytes) -> str:
        """The new file's name. It is on the disk when this returns."""
        scope, _, ref = entry.partition(":")
        name = f"{ref}.{secrets.token_hex(8)}"
        place = self._folder / scope
        for folder in (self._folder.parent, self._folder, place):
            folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        new = place / f".{name}"
        try:
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            new.replace(place / name)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        return name

    def read(self, entry: str, name: str) -> bytes | None:
        """None if it can't be read."""
        try:
            return self._path(entry, name).read_bytes()
        except (OSError, ValueError):
            return None

    def has(self, entry: str, name: str) -> bool:
        try:
            return self._path(entry, name).is_file()
        except ValueError:
            return False

    def delete(self, files: Iterable[Named]) -> None:
        for entry, name in files:
            self._path(entry, name.removeprefix("."), hidden=name.startswith(".")).unlink(missing_ok=True)

    def listed(self, older_than_s: float) -> list[list[Named]]:
        """All files of at least this age, some at a time; what a dying writer left half done among them."""
        before = time.time() - older_than_s
        found: list[Named] = []
        for scope in self._folder.iterdir() if self._folder.is_dir() else ():
            if not _SCOPE.fullmatch(scope.name):
                continue
            with os.scandir(scope) as files:
                for file in files:
                    name = file.name.removeprefix(".")
                    if _NAME.fullmatch(name) and _written(file) <= before:
                        found.append((f"{scope.name}:{name[:64]}", file.name))
        return [found[start : start + _BATCH] for start in range(0, len(found), _BATCH)]

    def _path(self, entry: str, name: str, *, hidden: bool = False) -> Path:
        scope, _, ref = entry.partition(":")
        if not _SCOPE.fullmatch(scope) or not _NAME.fullmatch(name) or not name.startswith(ref):
            raise ValueError("not a medium's file")
        return self._folder / scope / (f".{name}" if hidden else name)


def _written(file: os.DirEntry[str]) -> float:
    """When it was written; a file that another sweep has just deleted is a young one."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
