"""HTTP to URLs that strangers name: only to addresses that anybody on the internet could reach as well.

Each name is resolved once, all its addresses are checked, and the connection goes to one of just these: what a name
server says a moment later plays no part. Redirects are followed by hand, each checked like the first URL. No proxy, no
cookies, no credentials of ours, no connection used twice.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import httpcore2

from tokenfleet.wire.errors import InvalidRequest

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_URL_CHARS = 4096


class UrlRefused(InvalidRequest):
    """A URL that is not followed: not http(s), or of an address inside somebody's own network."""

    code = "url_refused"


class UrlUnreachable(InvalidRequest):
    """A URL that gave nothing usable: no such host, no answer in time, a status that is no success, too many bytes."""

    code = "url_unreachable"


def is_public(address: _Address) -> bool:
    """Whether a packet to it goes to the internet at large: not loopback, private, link-local, shared, reserved,
    multicast, and no IPv6 form that holds such an IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.sixtofour is not None or address.teredo is not None or address.is_site_local:
            return False
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_unspecified or address.is_loopback
    )


class SafeHttp:
    """``allowed`` are networks that are reached although they are not public, e.g. ``10.1.2.0/24`` of one's own media
    server. Methods raise `UrlRefused` and `UrlUnreachable`; their texts tell nothing of addresses."""

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self._resolver = _CheckedBackend(tuple(ipaddress.ip_network(network) for network in allowed))

    async def get(self, url: str, *, max_bytes: int, timeout_s: float, max_redirects: int = 3) -> bytes:
        """The body, within ``timeout_s`` in all. Raises `UrlUnreachable` for one above ``max_bytes``."""
        async with self._bounded(timeout_s) as pool:
            for _ in range(max_redirects + 1):
                headers = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "tokenfleet"}
                async with pool.stream("GET", parsed(url), headers=_raw(headers)) as reply:
                    if reply.status in _REDIRECTS and (location := _header(reply, b"location")):
                        url = urljoin(url, location)
                        continue
                    if reply.status != 200:
                        raise UrlUnreachable(f"The URL's server answers with status {reply.status}.")
                    told = _header(reply, b"content-length")
                    if told.isdecimal() and int(told) > max_bytes:
                        raise _too_large(max_bytes)
                    body = bytearray()
                    async for piece in reply.aiter_stream():
                        body += piece
                        if len(body) > max_bytes:
                            raise _too_large(max_bytes)
                    return bytes(body)
        raise UrlUnreachable(f"The URL leads on more than {max_redirects} times.")

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float) -> int:
        """Send ``body``; the reply's status. Redirects are not followed, the reply's body is not read."""
        async with self._bounded(timeout_s) as pool:
            told = {"User-Agent": "tokenfleet", **headers, "Content-Length": str(len(body))}
            async with pool.stream("POST", parsed(url), headers=_raw(told), content=body) as reply:
                return int(reply.status)

    def _bounded(self, timeout_s: float) -> _Bounded:
        return _Bounded(self._resolver, timeout_s)


class _Bounded:
    """A pool for one exchange, under one deadline; foreign errors become ours."""

    def __init__(self, backend: httpcore2.AsyncNetworkBackend, timeout_s: float) -> None:
        self._pool = httpcore2.AsyncConnectionPool(network_backend=backend, max_keepalive_connections=0)
        self._timeout_s = timeout_s
        self._deadline = asyncio.timeout(timeout_s)

    async def __aenter__(self) -> httpcore2.AsyncConnectionPool:
        await self._deadline.__aenter__()
        return self._pool

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            await self._deadline.__aexit__(kind, error, trace)
        except TimeoutError as late:
            raise UrlUnreachable(f"The URL gave no whole answer within {self._timeout_s:g} s.") from late
        finally:
            await self._pool.aclose()
        foreign = (
            httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, httpcore2.UnsupportedProtocol,
            OSError,
        )  # fmt: skip
        if isinstance(error, foreign):
            raise UrlUnreachable("The URL can't be reached.") from error


class _CheckedBackend(httpcore2.AnyIOBackend):
    """Connects to checked addresses only. TLS still checks the certificate against the name."""

    def __init__(self, allowed: tuple[_Network, ...]) -> None:
        self._allowed = allowed

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        failed: Exception | None = None
        for address in await self.addresses(host, port):
            try:
                return await super().connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failed = error
        raise failed or UrlUnreachable("The URL's host has no address.")

    async def addresses(self, host: str, port: int) -> list[_Address]:
        """Raises `UrlRefused` if any is not public: a name that leads inside is not meant for us at all."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            raise UrlUnreachable("The URL's host is unknown.") from error
        addresses = list(dict.fromkeys(ipaddress.ip_address(each[4][0]) for each in found))
        for address in addresses:
            if not is_public(address) and not any(address in network for network in self._allowed):
                raise UrlRefused(
                    "The URL's host is not on the public internet.",
                    hint="Send the content itself, or let whoever runs the gateway allow its network.",
                )
        return addresses


def parsed(url: str) -> httpcore2.URL:
    """The URL to connect to. Raises `UrlRefused` for anything but a plain http(s) URL."""
    if len(url) > _MAX_URL_CHARS or any(ord(c) < 33 or ord(c) == 127 for c in url):
        raise UrlRefused(f"A URL has at most {_MAX_URL_CHARS} characters, none of them blank.")
    try:
        parts = urlsplit(url)
        host, port = _host(parts), parts.port
    except ValueError as error:
        raise UrlRefused("This is not a valid URL.") from error
    if parts.scheme not in ("http", "https") or not host:
        raise UrlRefused("Only http and https URLs are followed.")
    if parts.username is not None or parts.password is not None:
        raise UrlRefused("A URL must not hold a password.")
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    if parts.query:
        target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    return httpcore2.URL(scheme=parts.scheme.encode(), host=host, port=port, target=target.encode())


def _host(parts: SplitResult) -> bytes:
    host = parts.hostname or ""
    return host.encode() if ":" in host else host.encode("idna")


def _header(reply: httpcore2.Response, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in reply.headers if key.lower() == name), "")


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("ascii"), value.encode("latin-1")) for name, value in headers.items()]


def _too_large(max_bytes: int) -> UrlUnreachable:
    return UrlUnreachable(f"What the URL holds is above {max_bytes} bytes.", code="media_too_large")
