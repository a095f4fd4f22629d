"""Who runs and who waits: the pool's slots. All of it belongs to the loop's thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from tokenfleet.workers.pool_job import Job


class Slots:
    """First come, first served. Celery hands over more jobs than there are slots only for due ETA tasks, tasks that
    are acknowledged early, and after a shrink."""

    def __init__(self, limit: int, forget: Callable[[Job], object]) -> None:
        """``forget`` is called with a job that won't be run: its message goes back into the queue."""
        self.limit = limit
        self._forget = forget
        self._is_closed = False
        self.running: set[Job] = set()
        self.waiting: deque[Job] = deque()
        self.most_running = 0

    def admit(self, job: Job) -> None:
        self.waiting.append(job)
        self._fill()
        if self._is_closed:
            self.close()

    def release(self, job: Job) -> None:
        self.running.discard(job)
        self._fill()

    def resize(self, limit: int) -> None:
        """What runs beyond a lower limit finishes."""
        self.limit = limit
        self._fill()

    def stop(self, job: Job) -> None:
        """Cancel it, or have it over before it began."""
        if job in self.running:
            job.stop()
        elif job in self.waiting:
            self.waiting.remove(job)
            Job.conclude(job)

    def close(self) -> None:
        """Start no more jobs."""
        self._is_closed = True
        while self.waiting:
            self._forget(self.waiting.popleft())

    def stop_all(self) -> None:
        self.close()
        for job in tuple(self.running):
            job.stop()

    def _fill(self) -> None:
        while self.waiting and not self._is_closed and len(self.running) < self.limit:
            job = self.waiting.popleft()
            self.running.add(job)
            job.start()
        self.most_running = max(self.most_running, len(self.running))
