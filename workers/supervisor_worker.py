"""One worker under the supervisor: started, watched, started again, given up."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from tokenfleet.wire.errors import ErrorBody, FleetUnavailable
from tokenfleet.wire.local_files import FleetFolder, LocalFleetConfig, WorkerReport, WorkerState
from tokenfleet.wire.private_files import last_lines, read
from tokenfleet.workers import lifeline, worker_state

CELERY_WORKER = (
    sys.executable, "-m", "celery", "-A", "tokenfleet.workers.app", "worker", "--hostname", "worker{index}@{name}",
)  # fmt: skip
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_STABLE_S = 60.0  # a worker that was ready for so long starts again at once
_FAREWELL_S = 10.0  # how long a worker that reported its failure may take to leave


class WorkerProcess:
    """Call `tend` again and again. It never raises for anything the worker does."""

    def __init__(self, index: int, folder: FleetFolder, config: LocalFleetConfig, env: Mapping[str, str], lock: int):
        self.state = WorkerState(index=index, state="waiting")
        self.is_busy = False
        self._folder = folder
        self._config = config
        self._env = _environment(index, folder, config, env)
        self._lock = lock
        self._process: lifeline.Guarded | None = None
        self._next_start = 0.0
        self._log_start = 0
        self._ready_since: float | None = None
        self._failed_since: float | None = None
        self._early_deaths = 0  # in a row, before it was ready
        self._deaths = 0  # in a row, without a stable life between them

    @property
    def guard_pid(self) -> int:
        return self._process.guard_pid if self._process else 0

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def tend(self, now: float) -> None:
        """Start it if it is due, read what it reports, see to its death. ``now`` is monotonic, in seconds."""
        if self._process is None:
            if self.state.state in ("waiting", "restarting") and now >= self._next_start:
                try:
                    self._start()
                except OSError as error:  # no more processes, no memory, no disk
                    self._bury(f"could not be started ({error.strerror or error})", None, now)
            return
        report = read(self._folder.worker_report(self.state.index), WorkerReport)
        status = self._process.poll()
        if status is not None:
            self._bury(_ending(status), report, now)
        elif report is not None:
            self._believe(report, now)

    def terminate(self) -> None:
        """Ask it to finish or hand over its jobs and leave; it is not started again."""
        if self._process is None:
            self._show("stopped")
        else:
            self._process.terminate()

    def cut(self) -> None:
        """Have it and its children killed, without waiting."""
        if self._process is not None:
            self._process.cut()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None
        self._show("stopped")

    def _start(self) -> None:
        index = self.state.index
        self._ready_since = self._failed_since = None
        self._folder.worker_report(index).unlink(missing_ok=True)
        command = [
            part.replace("{index}", str(index)).replace("{name}", self._folder.fleet)
            for part in self._config.command or CELERY_WORKER
        ]
        cwd = self._config.cwd if Path(self._config.cwd or "/nowhere").is_dir() else self._folder.path
        with self._folder.worker_log(index).open("ab") as log:
            self._log_start = log.tell()
            self._process = lifeline.spawn(command, env=self._env, cwd=cwd, output=log, held_fds=(self._lock,))
        self._show("starting", detail="starting the worker", pid=self._process.pid)

    def _believe(self, report: WorkerReport, now: float) -> None:
        self.is_busy = report.is_busy
        if report.state == "failed":
            self._failed_since = self._failed_since or now
            if now - self._failed_since > _FAREWELL_S:
                self.cut()
            self._show("restarting", detail=report.detail)
            return
        if report.state == "ready":
            self._early_deaths = 0
            self._ready_since = self._ready_since or now
        self._show(report.state, detail=report.detail, progress=report.progress, models=report.models)

    def _bury(self, ending: str, report: WorkerReport | None, now: float) -> None:
        self._process = None
        self.is_busy = False
        error = report.error if report is not None and report.state == "failed" else None
        if self._ready_since is None:
            self._early_deaths += 1
        self._deaths = 0 if self._ready_since is not None and now - self._ready_since > _STABLE_S else self._deaths + 1
        if error is not None and not error.retryable:
            self._show("failed", detail=error.message, error=error)
        elif self._early_deaths >= self._config.start_attempts:
            error = error or self._unexplained(ending)
            self._show("failed", detail=error.message, error=error)
        else:
            pause = min(_FIRST_PAUSE_S * 2 ** (self._deaths - 1), _LONGEST_PAUSE_S) if self._deaths else 0.0
            self._next_start = now + pause
            detail = f"it {ending}; starting it again"
            self._show("restarting", detail=detail, restarts=self.state.restarts + 1)

    def _unexplained(self, ending: str) -> ErrorBody:
        log = self._folder.worker_log(self.state.index)
        times = f", {self._early_deaths} times in a row" if self._early_deaths > 1 else ""
        message = f"Worker {self.state.index} {ending} before it was ready{times}. Its last words:"
        return FleetUnavailable(
            f"{message}\n{last_lines(log, 8, self._log_start)}", code="fleet_failed", hint=f"Its log: {log}"
        ).to_body()

    def _show(
        self,
        state: str,
        *,
        detail: str = "",
        progress: float | None = None,
        models: tuple[str, ...] = (),
        error: ErrorBody | None = None,
        pid: int | None = None,
        restarts: int | None = None,
    ) -> None:
        self.state = msgspec.structs.replace(
            self.state,
            state=state,
            detail=detail,
            progress=progress,
            models=models,
            error=error,
            pid=(self.state.pid if self._process else 0) if pid is None else pid,
            restarts=self.state.restarts if restarts is None else restarts,
        )


def _environment(index: int, folder: FleetFolder, config: LocalFleetConfig, env: Mapping[str, str]) -> dict[str, str]:
    # A worker prefers its environment to its file: what the file says must not be overridden by where we were started.
    ours = {f"TOKENFLEET_{name.upper()}" for name in (*config.worker, "redis_url", "fleet", "media_folder")}
    result = {name: value for name, value in env.items() if name.upper() not in ours}
    result["TOKENFLEET_CONFIG"] = str(folder.worker_settings)
    result[worker_state.ENV] = str(folder.worker_report(index))
    gpus = config.visible_gpus(index)
    if gpus is not None:
        # Before the process starts: CUDA reads it once. By bus, so that the numbers are nvidia-smi's.
        result["CUDA_VISIBLE_DEVICES"] = gpus
        result["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    return result


def _ending(status: int) -> str:
    if status == 128 + signal.SIGKILL:
        return "was killed (SIGKILL; by the kernel, if memory ran out)"
    if status > 128:
        try:
            return f"died of {signal.Signals(status - 128).name}"
        except ValueError:
            pass
    return f"ended with status {status}"
