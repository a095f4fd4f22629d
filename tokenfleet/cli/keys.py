"""``tokenfleet keys``: the gateway's API keys, what tenants may use, and their webhook secrets."""

from __future__ import annotations

import asyncio
import datetime as dt

import click
import msgspec

from tokenfleet.cli.connection import connected, connection_options
from tokenfleet.cli.output import note, write
from tokenfleet.producer.apikeys import KeyStore
from tokenfleet.producer.tenants import Limits, Tenants
from tokenfleet.wire.errors import InvalidRequest


@click.group("keys")
def command() -> None:
    """The gateway's API keys. Once there is one, every route but health needs a key."""


@command.command()
@connection_options
@click.option("--note", "text", default="", help="For people.")
@click.argument("tenant")
def create(redis_url: str | None, fleet: str, text: str, tenant: str) -> None:
    """Make a key for TENANT and print it, this once."""

    async def run() -> str:
        async with connected(redis_url, fleet) as client:
            secret, key = await KeyStore(client.ledger.client, client.keys).create(tenant, text)
            note(f"Key {key.id} of {tenant}: it is not shown again.")
            return secret

    write(f"{asyncio.run(run())}\n")


@command.command("list")
@connection_options
def list_keys(redis_url: str | None, fleet: str) -> None:
    """List keys by their ids; the keys themselves are not stored."""

    async def run() -> str:
        async with connected(redis_url, fleet) as client:
            keys = await KeyStore(client.ledger.client, client.keys).list()
        made = (dt.datetime.fromtimestamp(key.created_s, dt.UTC).isoformat(timespec="seconds") for key in keys)
        return "".join(f"{key.id}\t{key.tenant}\t{when}\t{key.note}\n" for key, when in zip(keys, made, strict=True))

    write(asyncio.run(run()))


@command.command()
@connection_options
@click.argument("key_id")
def revoke(redis_url: str | None, fleet: str, key_id: str) -> None:
    """Revoke a key; it works for at most two seconds more."""

    async def run() -> None:
        async with connected(redis_url, fleet) as client:
            if not await KeyStore(client.ledger.client, client.keys).revoke(key_id):
                raise InvalidRequest(f"There is no key {key_id!r}.", hint="`tokenfleet keys list` has their ids.")

    asyncio.run(run())


@command.command()
@connection_options
@click.option("--requests-per-minute", type=click.FloatRange(0, min_open=True))
@click.option("--tokens-per-minute", type=click.FloatRange(0, min_open=True), help="Prompt and completion.")
@click.option("--concurrent-jobs", type=click.IntRange(1), help="Jobs that wait or run.")
@click.option("--queue-share", type=click.FloatRange(0, 1, min_open=True), help="0.1: a tenth of a model's queue.")
@click.option("--clear", is_flag=True, help="Drop the limits that are not named here.")
@click.argument("tenant")
def limits(redis_url: str | None, fleet: str, tenant: str, clear: bool, **named: float | None) -> None:
    """Set what TENANT may use, and print its limits. What is not named stays as it is."""

    async def run() -> Limits:
        async with connected(redis_url, fleet) as client:
            tenants = Tenants(client.ledger.client, client.keys)
            old = Limits() if clear else await tenants.limits(tenant)
            given = {name: value for name, value in named.items() if value is not None}
            new = msgspec.convert(msgspec.to_builtins(old) | given, Limits)
            if given or clear:
                await tenants.set_limits(tenant, new)
            return new

    values = msgspec.to_builtins(asyncio.run(run()))
    write("".join(f"{name}\t{value:g}\n" for name, value in values.items()) or "no limits\n")


@command.command("webhook-secret")
@connection_options
@click.argument("tenant", default="")
def webhook_secret(redis_url: str | None, fleet: str, tenant: str) -> None:
    """Make a new secret that TENANT's webhooks are signed with, and print it.

    Without TENANT it is that of a gateway without keys."""

    async def run() -> str:
        async with connected(redis_url, fleet) as client:
            return await Tenants(client.ledger.client, client.keys).new_webhook_secret(tenant)

    write(f"{asyncio.run(run())}\n")
