"""A real gateway process on a real fleet, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from typing import Any

from tests.fleets import ROOT, Fleet, wait_until
from tests.processes import free_port


@dataclass
class Gateway:
    process: subprocess.Popen[bytes]
    url: str
    lifeline: int

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.lifeline)


def start_gateway(fleet: Fleet, *, wait: bool = True, **settings: Any) -> Gateway:
    """``settings`` are `GatewaySettings`' fields."""
    port = free_port()
    values = {"redis_url": fleet.redis.url, "fleet": fleet.redis.fleet, "port": port}
    values |= {"storage": fleet.folder / "storage", **settings}
    env = {**os.environ, **{f"TOKENFLEET_GATEWAY_{name.upper()}": str(value) for name, value in values.items()}}
    reader, lifeline = os.pipe()
    command = [sys.executable, str(ROOT / "tests" / "die_with_parent.py"), str(reader), sys.executable]
    command += ["-m", "tokenfleet.producer.gateway.serve"]
    process = subprocess.Popen(command, env=env, cwd=ROOT, pass_fds=[reader], start_new_session=True)
    os.close(reader)
    gateway = Gateway(process, f"http://127.0.0.1:{port}", lifeline)

    def is_up() -> bool:
        assert process.poll() is None, "the gateway exited"
        try:
            with urllib.request.urlopen(f"{gateway.url}/health", timeout=2) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    if wait:
        try:
            wait_until(is_up, 60, "the gateway is up")
        except BaseException:
            gateway.close()
            raise
    return gateway
