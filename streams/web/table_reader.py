"""Reading the trigger table wherever its partitions live: an answer comes from the worker that holds the key, or none.

A worker answers only while it is settled (assigned, recovered, certainly a member), reads only the partitions that it
holds, and asks the holder otherwise. What cannot be known now is `unavailable`, never "not found".
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from heapq import merge
from itertools import islice
from typing import Any

import msgspec
from aiohttp import ClientError, ClientResponse, web
from faust.types import TP
from yarl import URL

from streams.app import App
from streams.web.problems import unavailable
from tables.triggers import Entry

FORWARDED = "X-Tidemark-Forwarded"  # asked by another worker: answer yourself or not at all
PARTITIONS = "X-Tidemark-Partitions"  # of a listing: the partitions that it covers
_PEER_SECONDS = 5.0

Row = dict[str, Any]


class TableReader:
    """decode: a table value to the entry."""

    def __init__(self, app: App, table: Any, decode: Callable[[bytes], Entry]) -> None:
        self._app = app
        self._table = table
        self._decode = decode

    # -- one key ---------------------------------------------------------------------------------------------------

    async def look_up(self, request: web.Request, security_id: str) -> tuple[Row | None, URL]:
        """(the entry or None, the worker that holds it). Raises Problem `unavailable`."""
        key = security_id.encode()
        partition, holder = self._holder(key)
        if self._is_here(holder):
            return self._local(key, partition, security_id), holder
        if FORWARDED in request.headers:
            raise unavailable(f"partition {partition} of the table is moving")
        path = URL.build(path="/api/triggers", query={"security_id": security_id})  # "." and ".." are no path segments
        return await self._ask(holder, path, _read_entry), holder

    def partition(self, security_id: str) -> int:
        """Of the table. Raises Problem `unavailable` while the broker has not said how many there are."""
        partition = self._app.consumer.key_partition(self._table.changelog_topic_name, security_id.encode())
        if partition is None:
            raise unavailable("the table's partitions are not known yet")
        return int(partition)

    def _holder(self, key: bytes) -> tuple[int, URL]:
        if not self._app.settled:
            raise unavailable("the table is being assigned or recovered")
        partition = self.partition(key.decode())
        try:
            return partition, self._app.router.holder(self._tp(partition))
        except KeyError:
            raise unavailable(f"partition {partition} of the table is moving") from None

    def _local(self, key: bytes, partition: int, security_id: str) -> Row | None:
        """No await between the check that the partition is ours and the read."""
        if self._tp(partition) not in self._app.assignor.assigned_actives():
            raise unavailable(f"partition {partition} of the table is moving")
        value = self._table.data._db_for_partition(partition).get(key)
        return None if value is None else self._shown(security_id, value)

    # -- all keys --------------------------------------------------------------------------------------------------

    async def browse(self, request: web.Request, after: str, limit: int) -> list[Row]:
        """The entries after an id, in order of the ids' bytes, from all partitions. Raises Problem `unavailable`."""
        partitions = range(self._app.settings.internal_partitions)
        holders: dict[URL, set[int]] = {}
        for partition in partitions:
            try:
                holders.setdefault(self._app.router.holder(self._tp(partition)), set()).add(partition)
            except KeyError:
                raise unavailable("the table is being assigned or recovered") from None
        path = URL.build(path="/api/triggers", query={"after": after, "limit": str(limit)})
        found: list[Row] = []
        for holder, theirs in holders.items():
            if self._is_here(holder):
                rows, covered = self.browse_here(after, limit)
            else:
                rows, covered = await self._ask(holder, path, _read_listing)
            if not theirs <= covered:
                raise unavailable("partitions of the table are moving")
            found += rows
        return sorted(found, key=lambda row: row["security_id"].encode())[:limit]

    def browse_here(self, after: str, limit: int) -> tuple[list[Row], set[int]]:
        """(the entries of this worker's partitions, those partitions). Raises Problem `unavailable`."""
        if not self._app.settled:
            raise unavailable("the table is being assigned or recovered")
        topic = self._table.changelog_topic_name
        mine = {tp.partition for tp in self._app.assignor.assigned_actives() if tp.topic == topic}
        rows = islice(merge(*(self._scan(partition, after.encode()) for partition in sorted(mine))), limit)
        return [self._shown(key.decode(), value) for key, value in rows], mine

    def _scan(self, partition: int, after: bytes) -> Iterator[tuple[bytes, bytes]]:
        store = self._table.data
        for key, value in store._db_for_partition(partition).items(from_key=after):
            if key != store.offset_key and key > after:
                yield key, value

    # -- others ----------------------------------------------------------------------------------------------------

    def _tp(self, partition: int) -> TP:
        return TP(self._table.changelog_topic_name, partition)

    def _is_here(self, holder: URL) -> bool:
        mine = self._app.conf.canonical_url
        return (holder.host, holder.port) == (mine.host, mine.port)

    def _shown(self, security_id: str, value: bytes) -> Row:
        return {"security_id": security_id, **msgspec.to_builtins(self._decode(value))}

    async def _ask(self, holder: URL, path: URL, read: Callable[[ClientResponse], Any]) -> Any:
        headers = {FORWARDED: "1", "Accept": "application/json"}
        if self._app.settings.web_token:
            headers["Authorization"] = f"Bearer {self._app.settings.web_token.get_secret_value()}"
        try:
            async with asyncio.timeout(_PEER_SECONDS):
                async with self._app.http_client.get(holder.join(path), headers=headers) as response:
                    return await read(response)
        except (ClientError, TimeoutError, OSError) as error:
            raise unavailable(f"the worker that holds it does not answer: {error or type(error).__name__}") from None


async def _read_entry(response: ClientResponse) -> Row | None:
    body = await response.json(content_type=None)
    if response.status != 200:
        raise unavailable(str(body.get("detail", response.status)))
    return body[0] if body else None


async def _read_listing(response: ClientResponse) -> tuple[list[Row], set[int]]:
    body = await response.json(content_type=None)
    if response.status != 200:
        raise unavailable(str(body.get("detail", response.status)))
    return body, {int(partition) for partition in response.headers.get(PARTITIONS, "").split(",") if partition}
