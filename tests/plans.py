"""Plans of the statements that sinks really run: each is explained with its arguments, undone, and then run."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg

_SMALL = frozenset({"securities"})  # may be looked through
_PAGES_PER_ROW = 12  # down an index, and dead versions of the row; most reads take two to seven
_PAGES_AROUND = 1_000  # the keys of one large security; dead rows; less than any index of a large table has
_SETTINGS = (
    "plan_cache_mode",
    "work_mem",
    "enable_seqscan",
    "enable_bitmapscan",
    "enable_hashjoin",
    "enable_mergejoin",
)
_EXPLAINED = frozenset({"select", "with", "insert", "update", "delete"})


@dataclass(frozen=True, slots=True)
class Read:
    """One node of a plan that reads a table. rows: read by all its loops, those included that its filters removed."""

    table: str
    node: str
    rows: int
    loops: int
    pages: int

    @property
    def is_by_index(self) -> bool:
        """Whether an index leads to the rows: it is not looked through itself."""
        frugal = self.pages <= _PAGES_PER_ROW * (self.rows + self.loops) + _PAGES_AROUND
        return self.node != "Seq Scan" and frugal


@dataclass(frozen=True, slots=True)
class Ran:
    """A statement that has been run, and its plan."""

    sql: str
    plan: dict[str, Any]

    def reads(self) -> Iterator[Read]:
        """What the plan reads of tables, subplans and expressions included."""
        for node in nodes(self.plan):
            if "Relation Name" in node and node["Node Type"].endswith("Scan"):
                passed = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Index Recheck")
                rows = round(node["Actual Loops"] * sum(node.get(name, 0) for name in passed))
                by = f" by {node['Index Name']}" if "Index Name" in node else ""
                inner = [part for part in node.get("Plans", ()) if part["Parent Relationship"] != "Outer"]
                pages = _pages(node) - sum(map(_pages, inner))
                yield Read(node["Relation Name"], node["Node Type"] + by, rows, node["Actual Loops"], pages)


def _pages(node: dict[str, Any]) -> int:
    return int(node["Shared Hit Blocks"] + node["Shared Read Blocks"])


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A plan's nodes, from the top down."""
    yield plan
    for inner in plan.get("Plans", ()):
        yield from nodes(inner)


@dataclass
class Explaining:
    """Stands in for a connection, or for a pool of one."""

    connection: asyncpg.Connection
    ran: list[Ran] = field(default_factory=list)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """Its settings end with it, as a worker's do: here it is a part of another."""
        kept = [await self.connection.fetchval("select current_setting($1)", name) for name in _SETTINGS]
        async with self.connection.transaction():
            yield
        for name, value in zip(_SETTINGS, kept, strict=True):
            await self.connection.execute("select set_config($1, $2, true)", name, value)

    def acquire(self) -> Explaining:
        return self

    async def __aenter__(self) -> Explaining:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def execute(self, sql: str, *arguments: object) -> str:
        await self._explain(sql, arguments)
        return await self.connection.execute(sql, *arguments)

    async def fetch(self, sql: str, *arguments: object) -> list[asyncpg.Record]:
        await self._explain(sql, arguments)
        return await self.connection.fetch(sql, *arguments)

    async def fetchrow(self, sql: str, *arguments: object) -> asyncpg.Record | None:
        await self._explain(sql, arguments)
        return await self.connection.fetchrow(sql, *arguments)

    async def fetchval(self, sql: str, *arguments: object) -> Any:
        await self._explain(sql, arguments)
        return await self.connection.fetchval(sql, *arguments)

    def forget(self) -> None:
        """What has been run so far was preparation."""
        self.ran.clear()

    def check(self, limits: dict[str, int], *statements: str) -> None:
        """Each table of `limits` is read by index, and no node of a plan reads more rows of it.

        The statements were among those run, or part of one of them.
        """
        for statement in statements:
            assert any(statement in ran.sql for ran in self.ran), f"was not run: {statement}"
        for ran in self.ran:
            for read in ran.reads():
                limit = limits.get(read.table)
                if limit is not None:
                    fits = read.rows <= limit and (read.is_by_index or read.table in _SMALL)
                    assert fits, f"{read}, where {limit} rows are to be read by index: {ran.sql}"

    async def _explain(self, sql: str, arguments: Sequence[object]) -> None:
        """As a prepared statement, since that is what workers run: plan_cache_mode decides what it is planned for."""
        if sql.split(None, 1)[0] not in _EXPLAINED:
            return
        literals = await self._literals(sql, arguments)
        undone = self.connection.transaction()
        await undone.start()
        await self.connection.execute(f"prepare explained as {sql}")
        text = await self.connection.fetchval(
            f"explain (analyze, buffers, timing off, format json) execute explained{literals}"
        )
        await self.connection.execute("deallocate explained")
        await undone.rollback()
        self.ran.append(Ran(sql, json.loads(text)[0]["Plan"]))

    async def _literals(self, sql: str, arguments: Sequence[object]) -> str:
        """EXECUTE takes no arguments but literals, and the server knows best how they are written."""
        if not arguments:
            return ""
        types = [parameter.name for parameter in (await self.connection.prepare(sql)).get_parameters()]
        quoted = ", ".join(f"quote_nullable((${n}::{type_})::text)" for n, type_ in enumerate(types, 1))
        return f"({', '.join(await self.connection.fetchrow(f'select {quoted}', *arguments))})"
