"""The web view of the `triggers` worker: table state by key, jobs and keys as JSON (contract, Web)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import ClientError
from faust.exceptions import SameNode
from faust.web.exceptions import ServiceUnavailable
from yarl import URL

from sinks import monitor
from streams.app import App
from tables.triggers import Entry

_PEER_SECONDS = 5.0


def add_pages(app: App, table: Any, decode: Callable[[bytes], Entry]) -> None:
    """Mount `/api/...`. decode: a table value to the entry."""

    def shown(key: bytes, value: bytes) -> dict[str, Any]:
        return {"security_id": key.decode(), **msgspec.to_builtins(decode(value))}

    @app.page("/api/triggers")
    async def triggers(web: Any, request: Any) -> Any:
        found = [shown(key, value) for key, value in table.items()]
        if "local" not in request.query:
            for peer in _peers(app, table):
                found += await _ask(app, peer, request)
        return web.json(sorted(found, key=lambda entry: entry["security_id"].encode()))

    @app.page("/api/triggers/{security_id}")
    async def trigger(web: Any, request: Any, security_id: str) -> Any:
        key = security_id.encode()
        try:
            return await app.router.route_req(table.name, key, web, request)
        except SameNode:
            value = table.get(key)
        except ClientError as error:
            raise ServiceUnavailable(f"the worker that holds {security_id} does not answer: {error}") from error
        if value is None:
            return web.json({"error": f"nothing is in flight or pending for {security_id}"}, status=404)
        return web.json(shown(key, value))

    @app.page("/api/jobs")
    async def jobs(web: Any, request: Any) -> Any:
        async with (await app.pool()).acquire() as connection:
            return _json(web, await monitor.read_jobs(connection, 200))

    @app.page("/api/portfolios/{portfolio_id}/securities/{security_id}")
    async def key(web: Any, request: Any, portfolio_id: str, security_id: str) -> Any:
        async with (await app.pool()).acquire() as connection:
            found = await monitor.read_key(connection, portfolio_id, security_id)
        if found is None:
            return web.json({"error": f"portfolio {portfolio_id} has never held {security_id}"}, status=404)
        return _json(web, found)


def _json(web: Any, value: Any) -> Any:
    """Decimals as JSON numbers with every digit, dates as ISO text."""
    body = msgspec.json.Encoder(decimal_format="number").encode(value)
    return web.bytes(body, content_type="application/json")


def _peers(app: App, table: Any) -> list[URL]:
    """The other workers that hold partitions of the table."""
    mine = app.conf.canonical_url
    hosts = [URL(host) for host, held in app.router.table_metadata(table.name).items() if any(held.values())]
    return [host for host in hosts if (host.host, host.port) != (mine.host, mine.port)]


async def _ask(app: App, peer: URL, request: Any) -> list[dict[str, Any]]:
    url = peer.with_path("/api/triggers").with_query("local=1")
    headers = {name: request.headers[name] for name in ("Authorization",) if name in request.headers}
    try:
        async with asyncio.timeout(_PEER_SECONDS), app.http_client.get(url, headers=headers) as response:
            response.raise_for_status()
            entries: list[dict[str, Any]] = await response.json()
            return entries
    except (ClientError, TimeoutError) as error:
        raise ServiceUnavailable(f"{peer} does not answer: {error}") from error
