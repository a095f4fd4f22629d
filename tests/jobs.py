"""What has become of the jobs that a test made."""

from __future__ import annotations

from collections import Counter

from tests.fleets import Fleet, wait_until


class Jobs:
    """The jobs that come into being from now on."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._old = self._ids()

    def _ids(self) -> set[str]:
        prefix = f"tokenfleet:{self._fleet.redis.fleet}:job:"
        with self._fleet.redis.client() as redis:
            return {key.decode().removeprefix(prefix) for key in redis.keys(f"{prefix}*")}

    def states(self) -> Counter[str]:
        with self._fleet.redis.client() as redis:
            name = f"tokenfleet:{self._fleet.redis.fleet}:job:"
            return Counter(redis.hget(name + job_id, "state").decode() for job_id in self._ids() - self._old)

    def all_end_cancelled(self, at_least: int) -> None:
        wait_until(lambda: not self.states().keys() - {"cancelled"}, what=f"all cancelled, not {self.states()}")
        assert self.states()["cancelled"] >= at_least, self.states()
