"""Addresses of a Redis: one URL for users, and the spellings that redis-py and Celery want.

======================================  ===============================================  ===========================
what a user gives (canonical)           for redis-py                                     for Celery (kombu, backend)
======================================  ===============================================  ===========================
``redis://[USER]:PASS@HOST:PORT/DB``    the same                                         the same
``rediss://...?ssl_...=``               the same                                         + ``ssl_cert_reqs=required``
``unix://[USER]:PASS@/PATH?db=0``       the same                                         ``redis+socket://...?virtual_host=0``
``sentinel://[USER]:PASS@H1:P1,H2:P2``  none: use `connect` (``redis.sentinel``)         ``sentinel://...;sentinel://...``
``/DB?master_name=NAME``                                                                 + transport option master_name
======================================  ===============================================  ===========================

Celery's own spellings are understood too, so a URL out of a ``celeryconfig.py`` works everywhere.

``?replicas=N`` in a client's URL: what it submits and what it reads counts only once N replicas of Redis have it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from tokenfleet.wire.errors import ConfigurationError

SCHEMES = ("redis", "rediss", "unix", "sentinel")
_ALIASES = {"redis+socket": "unix", "redis+unix": "unix", "socket": "unix"}
_DEFAULT_PORTS = {"redis": 6379, "rediss": 6379, "sentinel": 26379}
_MOST_CONNECTIONS, _WAIT_FOR_CONNECTION_S = 48, 30.0
_HINT = "Use redis://:PASSWORD@HOST:6379/0, rediss://, unix://:PASSWORD@/path/to.sock?db=0 or sentinel://."


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """A parsed URL. Its `repr` holds no password."""

    scheme: str
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    db: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    master_name: str = ""
    options: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    replicas: int = 0
    """How many replicas must have what a client submits or reads (`Ledger`)."""

    def url(self) -> str:
        """The canonical URL, which `parse` reads back to an equal address."""
        return self._url([("replicas", str(self.replicas))] if self.replicas else [])

    def _url(self, more: list[tuple[str, str]]) -> str:
        query = [*self.options, *more]
        if self.scheme == "unix":
            return f"unix://{self._login()}{quote(self.path)}{_query([('db', str(self.db)), *query])}"
        if self.scheme == "sentinel":
            query = [("master_name", self.master_name), *query]
        return f"{self.scheme}://{self._login()}{self._netloc()}/{self.db}{_query(query)}"

    def for_redis_py(self) -> str:
        """What ``redis.Redis.from_url`` takes. Raises `ConfigurationError` for a Sentinel, which has no such URL."""
        if self.scheme == "sentinel":
            raise ConfigurationError("redis-py has no URL for a Sentinel.", hint="Use tokenfleet.wire.urls.connect.")
        return self._url([])

    def for_celery(self) -> str:
        """What Celery takes as ``broker_url`` and ``result_backend``; see `celery_transport_options` too."""
        query = list(self.options)
        if self.scheme == "unix":
            query = [("virtual_host", str(self.db)), *query]
            return f"redis+socket://{self._login()}{quote(self.path)}{_query(query)}"
        if self.scheme == "sentinel":
            return ";".join(f"sentinel://{self._login()}{_host(*host)}/{self.db}{_query(query)}" for host in self.hosts)
        if self.scheme == "rediss" and "ssl_cert_reqs" not in dict(query):
            query = [("ssl_cert_reqs", "required"), *query]  # redis-py's default; Celery's backend refuses to guess
        return f"{self.scheme}://{self._login()}{self._netloc()}/{self.db}{_query(query)}"

    def celery_transport_options(self) -> dict[str, Any]:
        """For both ``broker_transport_options`` and ``result_backend_transport_options``."""
        return {"master_name": self.master_name} if self.scheme == "sentinel" else {}

    def redacted(self) -> str:
        """The URL with its password hidden: the only form for logs, messages and dashboards."""
        hidden = RedisAddress(
            self.scheme,
            self.hosts,
            self.path,
            self.db,
            self.username,
            "***" if self.password else "",
            self.master_name,
            tuple((name, "***" if "password" in name else value) for name, value in self.options),
            self.replicas,
        )
        return hidden.url().replace(quote("***", safe=""), "***")

    def _login(self) -> str:
        if not (self.username or self.password):
            return ""
        return f"{quote(self.username, safe='')}:{quote(self.password, safe='')}@"

    def _netloc(self) -> str:
        return ",".join(_host(*host) for host in self.hosts)


def parse(url: str) -> RedisAddress:
    """Read a URL of any supported form. Raises `ConfigurationError`, whose text never repeats the URL's password."""
    if not isinstance(url, str) or "://" not in url:
        raise ConfigurationError("The Redis URL has no scheme.", hint=_HINT)
    first = url.partition(";")[0]  # Celery's list of sentinels repeats scheme and login for each
    scheme, _, rest = first.partition("://")
    scheme = _ALIASES.get(scheme.lower(), scheme.lower())
    if scheme not in SCHEMES:
        raise ConfigurationError(f"A Redis URL can't begin with {scheme}://.", hint=_HINT)
    parts = _split(rest)
    login, _, netloc = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    query = dict(parse_qsl(parts.query))
    replicas = _count(query.pop("replicas", "0"), "number of replicas")
    common: dict[str, Any] = {"username": unquote(username), "password": unquote(password), "replicas": replicas}
    if scheme == "unix":
        if netloc or not parts.path.strip("/"):
            raise ConfigurationError("A unix:// URL needs an absolute path.", hint=_HINT)
        db = _db(query.pop("virtual_host", "") or query.pop("db", "") or "0")
        return RedisAddress("unix", (), unquote(parts.path), db, options=tuple(query.items()), **common)
    hosts = [netloc, *(_split(more.partition("://")[2]).netloc.rpartition("@")[2]
                       for more in url.split(";")[1:])]  # fmt: skip
    master_name = query.pop("master_name", "mymaster") if scheme == "sentinel" else ""
    pairs = tuple(_pair(host, _DEFAULT_PORTS[scheme]) for group in hosts for host in group.split(","))
    if scheme != "sentinel" and len(pairs) > 1:
        raise ConfigurationError("A redis:// URL names one host.", hint="For several sentinels use sentinel://.")
    db = _db(query.pop("db", "") or parts.path.strip("/") or "0")
    return RedisAddress(scheme, pairs, "", db, master_name=master_name, options=tuple(query.items()), **common)


def to_redis_py(url: str) -> str:
    return parse(url).for_redis_py()


def to_celery(url: str) -> str:
    return parse(url).for_celery()


def redacted(url: str) -> str:
    """``url`` without its password; of something that is no Redis URL, nothing but its scheme."""
    try:
        return parse(url).redacted()
    except ConfigurationError:
        return f"{url.partition('://')[0][:20]}://***" if "://" in url else "***"


def connect(url: str, **options: Any) -> Any:
    """A ``redis.Redis`` for any supported URL, Sentinel included; ``options`` are redis-py's own."""
    import redis

    address = parse(url)
    if address.scheme != "sentinel":
        return redis.Redis.from_url(address.for_redis_py(), **options)
    from tokenfleet.wire import sentinels

    return sentinels.connect(list(address.hosts), address.master_name, _login_options(address) | options)


def connect_async(url: str, **options: Any) -> Any:
    """A ``redis.asyncio.Redis`` for any supported URL; see `connect`."""
    import redis.asyncio

    from tokenfleet.wire.cancellable import make_cancellable

    address = parse(url)
    if address.scheme != "sentinel":
        # Calls beyond this many wait for a connection; redis-py's own pool fails the 101st.
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            address.for_redis_py(), max_connections=_MOST_CONNECTIONS, timeout=_WAIT_FOR_CONNECTION_S, **options
        )
        return make_cancellable(redis.asyncio.Redis.from_pool(pool))
    from tokenfleet.wire import sentinels

    return sentinels.connect_async(list(address.hosts), address.master_name, _login_options(address) | options)


def _login_options(address: RedisAddress) -> dict[str, Any]:
    login = {"username": address.username, "password": address.password}
    return {"db": address.db} | {name: value for name, value in login.items() if value}


def _query(pairs: list[tuple[str, str]]) -> str:
    return f"?{urlencode(pairs)}" if pairs else ""


def _host(name: str, port: int) -> str:
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def _pair(netloc: str, default_port: int) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]*))(?::(\d{1,5}))?", netloc)
    port = int(match[3] or default_port) if match else 0
    if match is None or not 0 < port < 65536:
        raise ConfigurationError("The Redis URL's host or port is malformed.", hint=_HINT)
    return unquote(match[1] or match[2] or "localhost"), port


def _split(rest: str) -> SplitResult:
    try:
        return urlsplit("redis://" + rest)
    except ValueError:
        # Its text, and the traceback's, would repeat the login.
        raise ConfigurationError("The Redis URL is malformed.", hint=_HINT) from None


def _db(text: str) -> int:
    return _count(text, "database")


def _count(text: str, what: str) -> int:
    if not text.isdecimal() or len(text) > 6:
        raise ConfigurationError(f"The Redis URL's {what} is not a number.", hint=_HINT)
    return int(text)
