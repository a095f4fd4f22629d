"""Redis URLs: what redis-py and Celery really make of what we give them."""

from __future__ import annotations

import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.utils.url import url_to_parts
from redis.connection import parse_url

from tokenfleet.wire import urls
from tokenfleet.wire.errors import ConfigurationError
from tokenfleet.wire.urls import RedisAddress, parse, redacted, to_celery, to_redis_py

SECRET = "s3cr3t-" + "word"  # never whole in a line that a traceback could quote
words = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)
hosts = st.tuples(st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}|::1", fullmatch=True), st.integers(1, 65535))
dbs = st.integers(0, 99)
paths = words.map(lambda text: f"/run/{text.replace('/', '-') or 'x'}.sock")
unix = st.builds(RedisAddress, st.just("unix"), path=paths, db=dbs, username=words, password=words)
tcp = st.builds(
    RedisAddress, st.sampled_from(["redis", "rediss"]), st.tuples(hosts), db=dbs, username=words, password=words
)
sentinels = st.builds(
    RedisAddress,
    st.just("sentinel"),
    st.lists(hosts, min_size=1, max_size=3).map(tuple),
    db=dbs,
    password=words,
    master_name=st.from_regex(r"[a-z]{1,8}", fullmatch=True),
    replicas=st.integers(0, 9),
)


@given(unix | tcp | sentinels)
def test_an_address_survives_its_own_url(address: RedisAddress) -> None:
    assert parse(address.url()) == address


def test_how_many_replicas_to_wait_for_is_ours_alone() -> None:
    address = parse("redis://:word@127.0.0.1:7000/1?replicas=2&socket_timeout=5")
    assert address.replicas == 2
    assert "replicas=2" in address.redacted()
    assert "replicas" not in address.for_redis_py() + address.for_celery()
    with pytest.raises(ConfigurationError):
        parse("redis://127.0.0.1:7000/1?replicas=many")


@given(unix | tcp)
def test_celerys_form_reads_back_to_the_same_address(address: RedisAddress) -> None:
    back = parse(address.for_celery())
    assert (back.scheme, back.hosts, back.path, back.db) == (address.scheme, address.hosts, address.path, address.db)
    assert (back.username, back.password) == (address.username, address.password)


@given(unix | tcp)
def test_redis_py_connects_where_we_mean(address: RedisAddress) -> None:
    kwargs = parse_url(to_redis_py(address.url()))
    assert kwargs["db"] == address.db
    assert kwargs.get("password", "") == address.password
    assert kwargs.get("username", "") == address.username
    if address.scheme == "unix":
        assert kwargs["path"] == address.path
    else:
        assert (kwargs["host"], kwargs["port"]) == address.hosts[0]


@given(unix | tcp)
def test_kombu_connects_where_we_mean(address: RedisAddress) -> None:
    parts = url_to_parts(address.for_celery())
    assert (parts.password or "") == address.password
    assert (parts.username or "") == address.username
    if address.scheme == "unix":
        assert parts.scheme == "redis+socket"
        assert f"/{parts.path}" == address.path
        assert parts.query["virtual_host"] == str(address.db)
    else:
        assert (parts.hostname, parts.port, parts.path) == (*address.hosts[0], str(address.db))


@given(st.text(max_size=40))
def test_anything_else_is_refused_without_repeating_it(text: str) -> None:
    said = ""
    try:
        parse(f"redis://:{SECRET}@{text}")
    except ConfigurationError as error:
        said = "".join(traceback.format_exception(error, chain=True))
    assert SECRET not in said


@given(unix | tcp | sentinels)
def test_no_password_is_left_in_a_redacted_url(address: RedisAddress) -> None:
    assert "@" not in address.password or address.password not in redacted(address.url())
    secret = RedisAddress(**{**{n: getattr(address, n) for n in address.__slots__}, "password": "s3cr3t-word"})
    for url in (secret.url(), secret.for_celery()):
        assert "s3cr3t-word" not in redacted(url)
        assert ":***@" in redacted(url)
    assert "s3cr3t-word" not in repr(secret)


def test_the_known_forms() -> None:
    assert to_celery("unix://:p%40ss@/run/r.sock?db=2") == "redis+socket://:p%40ss@/run/r.sock?virtual_host=2"
    assert to_redis_py("redis+socket://:p%40ss@/run/r.sock?virtual_host=2") == "unix://:p%40ss@/run/r.sock?db=2"
    assert to_redis_py("redis://h") == "redis://h:6379/0"
    assert to_celery("redis://h/3?socket_timeout=5") == "redis://h:6379/3?socket_timeout=5"
    assert to_celery("rediss://h") == "rediss://h:6379/0?ssl_cert_reqs=required"
    assert to_celery("rediss://h?ssl_cert_reqs=none") == "rediss://h:6379/0?ssl_cert_reqs=none"
    two = "sentinel://:pw@a,b:26380/1?master_name=main"
    assert to_celery(two) == "sentinel://:pw@a:26379/1;sentinel://:pw@b:26380/1"
    assert parse(two).celery_transport_options() == {"master_name": "main"}
    assert parse("sentinel://:pw@a:26379/1;sentinel://:pw@b:26380/1?x=1").hosts == (("a", 26379), ("b", 26380))
    assert redacted("redis://u:pw@h/0") == "redis://u:***@h:6379/0"
    assert redacted("amqp://u:pw@h/0") == "amqp://***"
    assert redacted("pw") == "***"


@pytest.mark.parametrize(
    "url",
    ["", "localhost:6379", "amqp://h", "redis://h:port", "redis://h:0", "redis://h:99999", "redis://h/x",
     "redis://a,b", "unix://", "unix://host/path", "unix:///p?db=x", "redis://[::1", "redis://h/-1"],
)  # fmt: skip
def test_malformed_urls_are_configuration_errors(url: str) -> None:
    with pytest.raises(ConfigurationError):
        parse(url)


def test_a_sentinel_has_no_redis_py_url() -> None:
    with pytest.raises(ConfigurationError, match="Sentinel"):
        to_redis_py("sentinel://h")


def test_importing_the_module_loads_no_redis_client() -> None:
    import subprocess
    import sys

    code = "import sys, tokenfleet.wire.urls; print([m for m in ('redis', 'celery', 'kombu') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    assert urls.SCHEMES
