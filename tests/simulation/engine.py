"""The models behind the interface of `tests.engine.Engine`, one step at a time: for tests that both must pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from sinks import model
from streams import records
from tables import triggers
from tests.simulation.books import TERMINAL, Books, Guards, JobRow, Processed
from tests.simulation.postgres import Database, Transaction
from tests.simulation.scheduler import finish


class ModelEngine:
    """One of each worker, acting only when told to."""

    def __init__(self, keys: int = 1_000) -> None:
        self.database = Database()
        self.books = Books(self.database, Guards())
        self.table: dict[str, triggers.Entry] = {}
        self.jobs: deque[model.Job] = deque()
        self.running: list[tuple[int, JobRow]] = []
        self._keys = keys

    async def take(self, topic: str, batch: Sequence[dict[str, Any]]) -> None:
        """One transaction of the topic's sink."""
        values = [msgspec.json.encode(record) for record in batch]

        async def effect() -> None:
            async with self.database.transaction() as tx:
                match topic:
                    case "business-dates":
                        await self.books.close_dates(tx, [records.decode_business_date(v) for v in values])
                    case "prices":
                        await self.books.store_prices(tx, [records.decode_price(v) for v in values])
                    case "transactions":
                        await self.books.book(tx, list(enumerate(map(records.decode_transaction, values))))

        finish(effect())

    async def relay(self) -> int:
        """Pass on what waits in the outbox; the trigger agent hears it at once."""
        outbox = self.database.tables["outbox"]
        events = sorted(outbox.items())
        outbox.clear()
        for _, event in events:
            now = datetime.now(UTC)
            if event.topic == "reprocessing-triggers":
                trigger = triggers.Trigger(*event.value)
                self._act(event.key, triggers.on_trigger(self.table.get(event.key), trigger, now))
            elif not isinstance(event.value, Processed):
                status = triggers.Status(*event.value)
                self._act(event.key, triggers.on_status(self.table.get(event.key), status, now))
        return len(events)

    def _act(self, security: str, decision: triggers.Decision) -> None:
        if decision.publish:
            self.jobs.append(model.Job(**msgspec.structs.asdict(decision.publish)))
        self.table.pop(security, None)
        if decision.entry is not None:
            self.table[security] = decision.entry

    async def open_jobs(self) -> None:
        """The watermark sink reads all job records there are."""
        if not self.jobs:
            return
        jobs = list(self.jobs)
        self.jobs.clear()

        async def effect() -> list[tuple[int, JobRow]]:
            async with self.database.transaction() as tx:
                return await self.books.open_jobs(tx, jobs)

        known = {job_id for job_id, _ in self.running}
        self.running += [(i, job) for i, job in finish(effect()) if job.status not in TERMINAL and i not in known]

    async def reset_chunk(self, scan: int) -> None:
        """One chunk of the job whose turn it is."""
        job_id, job = self.running.pop(0)

        async def effect() -> JobRow | None:
            async with self.database.transaction() as tx:
                return await self.books.reset_chunk(tx, job_id, job, scan)

        after = finish(effect())
        assert after is not None
        if after.status not in TERMINAL:
            self.running.append((job_id, after))

    async def value(self) -> int:
        """One pass of the valuation."""
        return finish(self.books.value(self._keys))

    async def state(self) -> dict[str, Any]:
        """What the two must have in common: see `tests.conformance`."""
        tables, tx = self.database.tables, Transaction(self.database)
        keys = {(portfolio, security): (security, portfolio) for security, portfolio in tables["position_state"]}
        return {
            "epochs": {key: tables["position_state"][own].epoch for key, own in keys.items()},
            "watermarks": {
                key: (state.watermark, state.status)
                for key, own in keys.items()
                if (state := tables["position_state"][own]) and self._is_open(tx, own)
            },
            "history": {
                key: [tuple(row) for row in rows] for key, own in keys.items() if (rows := self.books.history(tx, own))
            },
            "snapshots": {
                key: [tuple(rows[day]) for day in sorted(rows)]
                for key, own in keys.items()
                if (rows := tables["snapshots"].get(own))
            },
            "corrections": [
                (seq, c.security, c.earliest, c.reason, c.is_reset, c.is_right)
                for seq, c in sorted(tables["corrections"].items())
            ],
        }

    def _is_open(self, tx: Transaction, key: tuple[str, str]) -> bool:
        history = self.books.history(tx, key)
        return bool(history) and history[-1].quantity != 0
