"""The offset ledger on the model of Postgres: the engine's own class, `sinks.offsets`, on a modelled connection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from sinks import claiming, offsets
from sinks.offsets import Offsets
from tests.simulation.postgres import Database, Transaction
from tests.simulation.scheduler import pause


class Connection:
    """Knows the ledger's statements; effects work on `tx`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.tx: Transaction = Transaction(database)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """As asyncpg's."""
        async with self._database.transaction() as self.tx:
            yield

    async def fetch(self, sql: str, group: str, *columns: Any) -> Any:
        """A claim."""
        assert sql == claiming.CLAIM
        await self.tx.statement()
        rows = []
        for topic, partition, log_start, _ in sorted(zip(*columns, strict=True)):
            key = (group, topic, partition)
            if not await self.tx.insert("offsets", key, (log_start, 1)):
                await self.tx.lock("offsets", key)
                next_offset, epoch = self.tx.get("offsets", key)
                self.tx.put("offsets", key, (next_offset, epoch + 1))
            next_offset, epoch = self.tx.get("offsets", key)
            rows.append(
                {"topic": topic, "partition": partition, "next_offset": next_offset, "epoch": epoch, "barren": 0}
            )
        return rows

    async def fetchrow(self, sql: str, *key: Any) -> Any:
        """A look at the stored offset that waits for a commit in doubt."""
        assert sql == offsets._READ_BACK
        await self.tx.statement()
        await self.tx.lock("offsets", key)
        next_offset, epoch = self.tx.get("offsets", key)
        return {"next_offset": next_offset, "epoch": epoch}

    async def fetchval(self, sql: str, *arguments: Any) -> Any:
        """The compare-and-swap."""
        assert sql == offsets._SWAP
        await self.tx.statement()
        group, topic, partition, next_offset, expected, epoch = arguments
        key = (group, topic, partition)
        await self.tx.lock("offsets", key)
        stored = self.tx.get("offsets", key)
        if stored != (expected, epoch) and self.fenced:
            return None
        self.tx.put("offsets", key, (next_offset, stored[1]))
        return 1

    execute = fetchval
    fenced = True


class Pool:
    """Hands out connections."""

    def __init__(self, database: Database, *, fenced: bool = True) -> None:
        self._database = database
        self._fenced = fenced

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Connection]:
        """As asyncpg's."""
        connection = Connection(self._database)
        connection.fenced = self._fenced
        yield connection


def ledger(database: Database, group: str, *, fenced: bool = True) -> Offsets:
    """A worker's ledger."""
    pool: Any = Pool(database, fenced=fenced)

    async def connect() -> Any:
        return pool

    wanted: Callable[[], Awaitable[Any]] = connect
    return Offsets(wanted, group, lambda: False)


def without_waiting(patch: pytest.MonkeyPatch) -> None:
    """The ledger's backoff is a pause of the scheduler, not one of the clock."""

    async def sleep(_: float) -> None:
        await pause()

    patch.setattr(offsets, "asyncio", SimpleNamespace(sleep=sleep))
    patch.setattr(offsets.logger, "disabled", True)
