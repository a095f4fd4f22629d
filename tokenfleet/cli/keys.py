"""``tokenfleet keys``: make, list and revoke the gateway's API keys."""

from __future__ import annotations

import asyncio
import datetime as dt

import click

from tokenfleet.cli.connection import connected, connection_options
from tokenfleet.cli.output import note, write
from tokenfleet.producer.apikeys import KeyStore
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
