"""Files and folders of one user's processes, and the locks by which these agree."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TypeVar

import msgspec

from tokenfleet.wire.errors import ConfigurationError

_T = TypeVar("_T", bound=msgspec.Struct)


def make_private(folder: Path) -> None:
    """Make ``folder`` and its missing parents for this user alone.

    Raises `ConfigurationError` if it, or one of the folders up to tokenfleet's own, is a link, is somebody else's, or
    can be written to by others: they could put a socket of theirs in place of ours.
    """
    places = [folder]
    while places[0].name not in ("tokenfleet", f"tokenfleet-{os.getuid()}") and places[0] != places[0].parent:
        places.insert(0, places[0].parent)
    for place in places:
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = place.lstat()
        except OSError as error:
            raise ConfigurationError(
                f"The folder {place} can't be made: {error.strerror}.",
                hint="Set XDG_RUNTIME_DIR and XDG_STATE_HOME to folders you own.",
            ) from error
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise ConfigurationError(
                f"{place} is not safe: it must be a folder of yours that nobody else can write to.",
                hint="Remove it, or set XDG_RUNTIME_DIR (and XDG_STATE_HOME) elsewhere.",
            )


def write_private(path: Path, content: bytes) -> None:
    """Written whole or not at all, and the owner's alone from its first byte on."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)
    new.replace(path)


def read(path: Path, kind: type[_T]) -> _T | None:
    """What stands in the file; None if there is none, or none of this format."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None


def try_lock(path: Path, *, shared: bool = False) -> int | None:
    """A descriptor that holds the lock (a flock: gone with the last process that has it), or None if others have it."""
    return _lock(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), shared=shared)


def _lock(fd: int, *, shared: bool) -> int | None:
    import fcntl  # not on Windows, where a producer still imports this module

    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def is_locked(path: Path) -> bool:
    """Whether somebody holds it exclusively. A file that is not there is not locked (and not made)."""
    try:
        fd = _lock(os.open(path, os.O_RDWR | os.O_CLOEXEC), shared=True)
    except FileNotFoundError:
        return False
    if fd is None:
        return True
    os.close(fd)
    return False


def last_lines(log: Path, count: int = 1, since_bytes: int = 0) -> str:
    """The last lines of a log that say anything, for an error message; from ``since_bytes`` on, if it is that long."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 16384, since_bytes if since_bytes <= size else 0))
            text = file.read().decode(errors="replace")
    except OSError:
        return "(no log)"
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:]) or "(its log is empty)"
