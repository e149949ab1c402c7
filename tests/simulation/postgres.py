"""A model of Postgres: READ COMMITTED, row locks, fair advisory locks, deadlock detection, commits in doubt.

Every statement is a point of interleaving and sees what is committed at that moment, and the transaction's own writes.
A row is written only by the transaction that holds its lock; the model asserts it. What it leaves out: phantom reads
inside one statement, lock modes weaker than exclusive, foreign keys. The tests of conformance hold it to the original.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import asyncpg

from tests.simulation.scheduler import pause, until

Row: TypeAlias = Any
RowKey: TypeAlias = tuple[str, Any]

_GONE = object()


class Database:
    """Committed rows by table and key, the locks on them, and sequences, which no rollback takes back."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[Any, Row]] = defaultdict(dict)
        self.locks: dict[RowKey, Transaction] = {}
        self.advisory: dict[str, list[tuple[Transaction, bool]]] = defaultdict(list)
        self.changes = 0
        """Grows with every commit that wrote, and every rollback that released a lock: what a poll would notice."""
        self.doubt: Callable[[], str | None] = lambda: None
        """Asked at each commit: None, or "lost" (rolled back) or "done" (committed), the client not being told."""
        self.waiting = 0
        """Transactions that wait for a lock now."""
        self._sequences: dict[str, int] = defaultdict(int)

    def next_value(self, sequence: str) -> int:
        """The next number."""
        self._sequences[sequence] += 1
        return self._sequences[sequence]

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """Commits at the end; rolls back when anything is raised, or the process is killed."""
        transaction = Transaction(self)
        try:
            yield transaction
            await pause()
            transaction.commit()
        finally:
            transaction.end()


class Transaction:
    """What one client does between BEGIN and COMMIT."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._writes: dict[RowKey, Row] = {}
        self._held: list[RowKey] = []
        self._waits_for: Callable[[], Iterable[Transaction]] = tuple
        self._advisory: list[str] = []
        self._cut = False

    def cut(self) -> None:
        """The server has ended the session."""
        self._cut = True
        self.end()

    def get(self, table: str, key: Any) -> Row | None:
        """A row as this statement sees it."""
        row = self._writes.get((table, key), _GONE)
        return self.database.tables[table].get(key) if row is _GONE else row

    def scan(self, table: str) -> dict[Any, Row]:
        """All rows as this statement sees them."""
        rows = dict(self.database.tables[table])
        for (written, key), row in self._writes.items():
            if written == table:
                if row is None:
                    rows.pop(key, None)
                else:
                    rows[key] = row
        return rows

    async def statement(self) -> None:
        """Another statement begins."""
        await pause()
        if self._cut:
            raise asyncpg.ConnectionDoesNotExistError("the session was ended")

    async def lock(self, table: str, key: Any) -> None:
        """Hold a row, or the place where one would be, until the end. Raises DeadlockDetectedError."""
        holder = self.database.locks.get((table, key))
        while holder is not None and holder is not self:
            await self._wait(lambda: [t] if (t := self.database.locks.get((table, key))) else [])
            holder = self.database.locks.get((table, key))
        if holder is None:
            self.database.locks[table, key] = self
            self._held.append((table, key))

    def try_lock(self, table: str, key: Any) -> bool:
        """As SKIP LOCKED: hold the row unless another does."""
        holder = self.database.locks.get((table, key))
        if holder is None:
            self.database.locks[table, key] = self
            self._held.append((table, key))
        return holder is None or holder is self

    async def lock_advisory(self, name: str, *, shared: bool) -> None:
        """Fair: nobody overtakes one who waits."""
        queue = self.database.advisory[name]
        me = (self, shared)
        queue.append(me)
        self._advisory.append(name)

        def ahead() -> list[Transaction]:
            before = queue[: queue.index(me)]
            return [t for t, is_shared in before if not (shared and is_shared)]

        while ahead():
            await self._wait(ahead)

    async def update(
        self, table: str, where: Callable[[Any, Row], bool], change: Callable[[Any, Row], Row]
    ) -> list[Any]:
        """UPDATE ... WHERE: rows are found as the statement begins, locked one after another in order of their keys,
        and looked at again where that had to wait. Returns the keys of the rows changed.
        """
        await self.statement()
        found = sorted(key for key, row in self.scan(table).items() if where(key, row))
        changed = []
        for key in found:
            await self.lock(table, key)
            row = self.get(table, key)
            if row is not None and where(key, row):
                self.put(table, key, change(key, row))
                changed.append(key)
        return changed

    async def insert(self, table: str, key: Any, row: Row) -> bool:
        """INSERT ... ON CONFLICT DO NOTHING: waits for another that inserts the same key; False where it is there."""
        if self.get(table, key) is not None:
            return False
        await self.lock(table, key)
        if self.get(table, key) is not None:
            return False
        self._writes[table, key] = row
        return True

    def put(self, table: str, key: Any, row: Row | None, guard: RowKey | None = None) -> None:
        """Write a row (None: delete it) whose lock, or that of the guard, is held."""
        assert self.database.locks.get(guard or (table, key)) is self, f"{table} {key} is written without its lock"
        self._writes[table, key] = row

    def append(self, table: str, key: Any, row: Row) -> None:
        """A new row of a key that nobody else can have."""
        self._writes[table, key] = row

    def commit(self) -> None:
        """All writes at once. Raises ConnectionDoesNotExistError where the answer was lost."""
        doubt = "lost" if self._cut else self.database.doubt()
        if doubt != "lost":
            for (table, key), row in self._writes.items():
                if row is None:
                    self.database.tables[table].pop(key, None)
                else:
                    self.database.tables[table][key] = row
            self.database.changes += bool(self._writes)
            self._held, held = [], self._held
            self._release(held)
        self.end()
        if doubt:
            raise asyncpg.ConnectionDoesNotExistError("connection lost during COMMIT")

    def end(self) -> None:
        """Release everything; what was not committed is gone."""
        self._writes = {}
        self.database.changes += bool(self._held)
        self._held, held = [], self._held
        self._release(held)
        for name in self._advisory:
            queue = self.database.advisory[name]
            queue[:] = [entry for entry in queue if entry[0] is not self]
        self._advisory = []

    def _release(self, held: list[RowKey]) -> None:
        for row in held:
            if self.database.locks.get(row) is self:
                del self.database.locks[row]

    async def _wait(self, blockers: Callable[[], Iterable[Transaction]]) -> None:
        self._waits_for = blockers
        self.database.waiting += 1
        try:
            if self._is_waited_for():
                raise asyncpg.DeadlockDetectedError("deadlock detected")
            await until(lambda: self._cut or not [t for t in blockers() if t is not self])
            if self._cut:
                raise asyncpg.ConnectionDoesNotExistError("the session was ended")
        finally:
            self._waits_for = tuple
            self.database.waiting -= 1

    def _is_waited_for(self) -> bool:
        """Whether whoever this one waits for waits for it, however many stand between."""
        seen: list[Transaction] = []
        ahead = list(self._waits_for())
        while ahead:
            other = ahead.pop()
            if other is self:
                return True
            if other not in seen:
                seen.append(other)
                ahead += other._waits_for()
        return False
