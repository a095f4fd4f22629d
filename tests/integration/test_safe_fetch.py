"""URLs of strangers: nothing inside a network is ever reached, by name, redirect, or odd spelling."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tokenfleet.producer.gateway.safe_fetch import SafeHttp, UrlRefused, UrlUnreachable, is_public
from tokenfleet.wire.errors import InvalidRequest

LOOPBACK = ("127.0.0.1/32",)


class Site(BaseHTTPRequestHandler):
    """``/bytes/N``, ``/to/URL``, ``/slow``, ``/endless``, ``/status/N``; it counts who came."""

    seen: list[str]

    def do_GET(self) -> None:
        type(self).seen.append(f"{self.headers['Host']}{self.path}")
        _, what, *rest = self.path.split("/", 2)
        match what:
            case "bytes":
                self._reply(200, b"x" * int(rest[0]))
            case "to":
                self._reply(302, b"", Location=rest[0])
            case "status":
                self._reply(int(rest[0]), b"no")
            case "endless":
                self.send_response(200)
                self.end_headers()
                while True:
                    try:
                        self.wfile.write(b"x" * 65536)
                    except OSError:
                        return
            case "slow":
                self.send_response(200)
                self.end_headers()
                for _ in range(1000):
                    try:
                        self.wfile.write(b"x")
                        self.wfile.flush()
                    except OSError:
                        return
                    threading.Event().wait(0.05)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).seen.append(f"{self.headers['X-Sign']} {body.decode()}")
        self._reply(202, b"")

    def _reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Any]:
    handler = type("OwnSite", (Site,), {"seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    server.seen = handler.seen  # type: ignore[attr-defined]
    yield server
    server.shutdown()
    server.server_close()


def get(url: str, allowed: tuple[str, ...] = (), **options: Any) -> bytes:
    return asyncio.run(SafeHttp(allowed).get(url, **{"max_bytes": 1000, "timeout_s": 30.0, **options}))


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
     "224.0.0.1", "255.255.255.255", "240.0.0.1", "198.18.0.1", "192.0.2.1", "::1", "::", "fe80::1", "fe80::1%lo",
     "fc00::1", "fd12::1", "ff02::1", "fec0::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1",
     "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001:db8::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2"],
)  # fmt: skip
def test_these_addresses_are_nobodys_business(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:2800:220:1::1", "::ffff:8.8.8.8"])
def test_these_are_the_internets(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "[::1]",
                                  "[::ffff:127.0.0.1]", "0"])  # fmt: skip
def test_no_spelling_of_this_machine_gets_through(site: Any, host: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        get(f"http://{host}:{site.server_port}/bytes/1")
    assert caught.value.code in ("url_refused", "url_unreachable")
    assert site.seen == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://8.8.8.8/", "gopher://x/", "http://", "//x/y", "http://u:p@x/",
                                 "http://x y/", "http://x/\r\nHost: y", "http://[::1", "http://x:99999/", "http://a..b/",
                                 "data:,x", "http://" + "x" * 5000])  # fmt: skip
def test_what_is_no_plain_url_is_refused(url: str) -> None:
    with pytest.raises(UrlRefused):
        get(url)


def test_an_allowed_network_is_reached_and_the_body_comes_whole(site: Any) -> None:
    assert get(f"{site.url}/bytes/1000", LOOPBACK) == b"x" * 1000
    assert site.seen == [f"127.0.0.1:{site.server_port}/bytes/1000"]


def test_a_redirect_is_checked_like_the_first_url(site: Any) -> None:
    assert get(f"{site.url}/to//bytes/5", LOOPBACK) == b"xxxxx"
    for inside in ("http://169.254.169.254/latest", "http://127.0.0.2/", "file:///etc/passwd", "http://10.0.0.1/"):
        with pytest.raises(UrlRefused):
            get(f"{site.url}/to/{inside}", LOOPBACK)
    with pytest.raises(UrlUnreachable):
        get(f"{site.url}/to//to//to//to//to//bytes/1", LOOPBACK)


@pytest.mark.parametrize(("path", "code"), [("/bytes/1001", "media_too_large"), ("/endless", "media_too_large"),
                                            ("/slow", "url_unreachable"), ("/status/404", "url_unreachable"),
                                            ("/status/204", "url_unreachable")])  # fmt: skip
def test_bytes_and_time_are_bounded(site: Any, path: str, code: str) -> None:
    with pytest.raises(UrlUnreachable) as caught:
        get(site.url + path, LOOPBACK, timeout_s=0.5 if path == "/slow" else 10.0)
    assert caught.value.code == code


def test_a_name_is_resolved_once_and_that_address_is_called(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    async def getaddrinfo(self: Any, host: str, port: int, **_: Any) -> Any:
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "127.0.0.9"  # what a rebinding name server would say next
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    url = f"http://media.example:{site.server_port}/bytes/3"
    assert get(url, LOOPBACK) == b"xxx"
    assert asked == ["media.example"]
    assert site.seen == [f"media.example:{site.server_port}/bytes/3"]


def test_one_inner_address_among_public_ones_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(self: Any, host: str, port: int, **_: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in ("93.184.216.34", "10.0.0.8")]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    with pytest.raises(UrlRefused):
        get("http://media.example/")


def test_a_dead_server_is_a_typed_error() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with pytest.raises(UrlUnreachable):
            get(f"http://127.0.0.1:{probe.getsockname()[1]}/", LOOPBACK)


def test_a_post_tells_its_status_and_is_checked_too(site: Any) -> None:
    post = lambda http, url: http.post(url, b"{}", {"X-Sign": "s"}, timeout_s=30.0)  # noqa: E731
    assert asyncio.run(post(SafeHttp(LOOPBACK), f"{site.url}/hook")) == 202
    assert site.seen == ["s {}"]
    with pytest.raises(UrlRefused):
        asyncio.run(post(SafeHttp(), f"{site.url}/hook"))
