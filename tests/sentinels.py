"""A Redis with replicas, watched by real sentinels: what kills its master sets off a real failover."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.processes import free_port, wait_until
from tokenfleet.wire import urls
from tokenfleet.workers import lifeline
from tokenfleet.workers.embedded_server import EmbeddedServer, find_binary


@dataclass
class ReplicatedRedis:
    """`tests.servers.RedisServer`'s interface, as far as a fleet needs it. ``nodes[0]`` is the first master."""

    nodes: list[EmbeddedServer]
    ports: list[int]
    sentinel_ports: list[int]
    password: str
    fleet: str
    replicas: int = 0
    """``?replicas=`` of the URL."""
    sentinels: list[Any] = field(default_factory=list)

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.sentinel_ports)
        more = f"&replicas={self.replicas}" if self.replicas else ""
        return f"sentinel://:{self.password}@{hosts}/0?master_name=main{more}"

    def client(self, **options: Any) -> redis.Redis:
        """Of whatever node is the master."""
        client: redis.Redis = urls.connect(self.url, **options)
        return client

    def kill_master(self) -> None:
        """SIGKILL; it stays dead."""
        os.kill(self.nodes[0].pid, signal.SIGKILL)
        self.nodes[0].kill()

    @contextlib.contextmanager
    def frozen_replicas(self) -> Iterator[None]:
        """Within the block no replica takes anything in."""
        for node in self.nodes[1:]:
            os.kill(node.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for node in self.nodes[1:]:
                os.kill(node.pid, signal.SIGCONT)


@contextlib.contextmanager
def replicated(fleet: str, *, replicas: int = 1, sentinels: int = 3, **settings: str) -> Iterator[ReplicatedRedis]:
    """A master with ``replicas``; ``settings`` are each server's (``min_replicas_to_write="1"``)."""
    password = secrets.token_urlsafe(12)
    with contextlib.ExitStack() as stack:
        nodes, ports = [], []
        for _ in range(1 + replicas):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tf-")))
            (folder / "password").write_text(password)
            port = free_port()
            own = {"port": str(port), "bind": "127.0.0.1", "masterauth": password, "repl-diskless-sync-delay": "0"}
            node = EmbeddedServer(folder, settings=own | {k.replace("_", "-"): v for k, v in settings.items()})
            node.start()
            stack.callback(node.kill)
            nodes.append(node)
            ports.append(port)
        for node in nodes[1:]:
            with node.client() as client:
                client.replicaof("127.0.0.1", ports[0])
                wait_until(lambda client=client: client.info("replication")["master_link_status"] == "up")
        cluster = ReplicatedRedis(nodes, ports, [free_port() for _ in range(sentinels)], password, fleet)
        for port in cluster.sentinel_ports:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tf-")))
            config = folder / "sentinel.conf"
            config.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
                f"sentinel monitor main 127.0.0.1 {ports[0]} {sentinels // 2 + 1}\nsentinel auth-pass main {password}\n"
                "sentinel down-after-milliseconds main 1000\nsentinel failover-timeout main 5000\n"
            )
            log = stack.enter_context((folder / "log").open("wb"))
            sentinel = lifeline.spawn([find_binary(), str(config), "--sentinel"], output=log)
            stack.callback(sentinel.kill)
            cluster.sentinels.append(sentinel)
        for port in cluster.sentinel_ports:
            wait_until(lambda port=port: _knows_all(port, replicas, sentinels))
        yield cluster


def _knows_all(port: int, replicas: int, sentinels: int) -> bool:
    try:
        with redis.Redis(port=port, retry=Retry(NoBackoff(), 0)) as client:
            seen: Any = client.info("sentinel")["master0"]
    except (redis.ConnectionError, KeyError):
        return False
    return bool((seen["status"], int(seen["slaves"]), int(seen["sentinels"])) == ("ok", replicas, sentinels))
