"""A worker for tests of the supervisor, without model and Celery: ``python fleet_worker.py MODE [FOLDER]``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tokenfleet.wire.errors import ConfigurationError
from tokenfleet.workers.worker_state import report_state


def serve(step_s: Path = Path("0.02")) -> None:
    """Load in four steps of ``step_s`` each, then serve until SIGTERM; says good-bye in Redis."""
    settings = json.loads(Path(os.environ["TOKENFLEET_CONFIG"]).read_text())

    def leave(_number: int, _frame: object) -> None:
        import redis  # here, since most workers never get so far as to need it

        with redis.Redis.from_url(settings["redis_url"]) as client:
            client.rpush("goodbyes", os.getpid())
        os._exit(0)

    signal.signal(signal.SIGTERM, leave)
    for step in range(4):
        report_state("loading", detail="loading weights", progress=step / 4)
        time.sleep(float(str(step_s)))
    report_state("ready", models=(settings.get("model", "m"),))
    rest()


def parent(folder: Path) -> None:
    """Serve, with a child in a session of its own that heeds no polite signal, as engines have them."""
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None
    child.stdout.readline()
    (folder / f"child-{os.getpid()}").write_text(str(child.pid))
    serve()


def forker(folder: Path) -> None:
    """Serve, with a forked copy in a session of its own, which keeps all that was inherited open."""
    if (child := os.fork()) == 0:
        os.setsid()
        rest()
    (folder / f"child-{os.getpid()}").write_text(str(child))
    serve()


def busy(folder: Path) -> None:
    """Serve, with jobs running until FOLDER/done exists."""
    report_state("ready", models=("m",), is_busy=True)
    while not (folder / "done").exists():
        time.sleep(0.02)
    serve()


def stubborn() -> None:
    """Serve, and don't end when asked to."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    report_state("ready", models=("m",))
    rest()


def broken() -> None:
    print(f"attempt of {os.getpid()}")
    sys.exit("no weights in the folder")


def misconfigured() -> None:
    report_state("failed", error=ConfigurationError("No such engine: 'warp'.", hint="Use transformers."))
    sys.exit(1)


def slow() -> None:
    """Never ready."""
    report_state("loading", detail="loading weights", progress=0.43)
    rest()


def rest() -> None:
    while True:
        signal.pause()


if __name__ == "__main__":
    globals()[sys.argv[1]](*map(Path, sys.argv[2:]))
