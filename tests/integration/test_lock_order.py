"""The order in which transactions take their locks, recorded on a real Postgres (docs/architecture.md, Lock order).

After every statement another session finds out which rows are locked by now: those that it would skip.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import pytest

from sinks import calendar, corrections, operations, repairs, resets, session
from sinks.database import connect
from tests.engine import Engine

ORDER = (
    "kafka_offsets",
    "calendar",
    "transactions",
    "market_prices",
    "reprocessing_jobs",
    "position_state",
    "securities",
    "corrections",
)
"""What a transaction may wait for. Rows of the other tables belong to a row that is held already, or are new."""

_KEYS = {
    "kafka_offsets": "consumer_group, topic, partition::text",
    "transactions": "transaction_id",
    "market_prices": "security_id, price_date::text",
    "reprocessing_jobs": "lpad(job_id::text, 19, '0')",
    "position_state": "security_id, portfolio_id",
    "securities": "security_id",
    "corrections": "lpad(seq::text, 19, '0')",
}


@dataclass(frozen=True, slots=True, order=True)
class Lock:
    """A row, by its table's place in ORDER and its key."""

    rank: int
    key: tuple[str, ...]

    def __str__(self) -> str:
        return f"{ORDER[self.rank]}{list(self.key)}"


@dataclass(slots=True)
class Recorder:
    """The steps of the transaction that runs: which locks each statement has added."""

    probe: session.Session
    backend: int = 0
    steps: list[tuple[str, frozenset[Lock]]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    transactions: int = 0

    def begin(self, backend: int) -> None:
        """A transaction starts."""
        self.backend, self.steps = backend, []
        self.transactions += 1

    async def note(self, statement: str) -> None:
        """Add what is locked now and was not before, and compare it with what was."""
        held = frozenset().union(*(locks for _, locks in self.steps))
        new = await self._locked() - held
        for lock in sorted(new):
            later = [before for before in held if _is_after(before, lock)]
            if later:
                self.wrong.append(f"{lock} after {max(later)}:\n{statement.strip()}")
        self.steps.append((statement, frozenset(new)))

    async def _locked(self) -> set[Lock]:
        found = set()
        async with self.probe.transaction():
            for table, key in _KEYS.items():
                rows = await self.probe.fetch(
                    f"select {key} from {table} except all "
                    f"select {key} from (select * from {table} for no key update skip locked) as free"
                )
                found |= {Lock(ORDER.index(table), tuple(row.values())) for row in rows}
            advisory = "select 1 from pg_locks where locktype = 'advisory' and pid = $1 and classid = 0 and objid = $2"
            if await self.probe.fetchval(advisory, self.backend, calendar._CALENDAR_LOCK):
                found.add(Lock(ORDER.index("calendar"), ()))
        return found


def _is_after(before: Lock, lock: Lock) -> bool:
    """Whether `before` may only be taken after `lock`. Corrections are guarded by their security's row."""
    if before.rank == lock.rank:
        return ORDER[lock.rank] != "corrections" and before.key > lock.key
    return before.rank > lock.rank


@pytest.fixture
async def recorder(database: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Recorder]:
    """Every session that is opened from now on tells it what it executes."""
    probe = await connect(database)
    made = Recorder(probe)

    class Recorded(session.Session):
        async def execute(self, query: str, *args: Any, **named: Any) -> Any:
            answer = await super().execute(query, *args, **named)
            await self._note(query)
            return answer

        async def _execute(self, query: str, *args: Any, **named: Any) -> Any:
            answer = await super()._execute(query, *args, **named)
            await self._note(query)
            return answer

        async def _note(self, query: str) -> None:
            if query.lower().startswith(("begin", "start transaction")):
                made.begin(self.get_server_pid())
            elif self.is_in_transaction() and made.backend == self.get_server_pid():
                await made.note(query)

    monkeypatch.setattr(session, "Session", Recorded)
    yield made
    await probe.close()


DAYS = ["2025-03-03", "2025-03-04", "2025-03-05"]
LATE = {"price_date": DAYS[0], "revision": 1}
EARLY, LATER = date(2025, 3, 3), date(2025, 3, 4)


def trade(name: str, portfolio: str, security: str, day: str = DAYS[1]) -> dict[str, Any]:
    """A purchase of one unit."""
    return {
        "transaction_id": name,
        "portfolio_id": portfolio,
        "security_id": security,
        "transaction_date": day,
        "transaction_type": "BUY",
        "quantity": 1,
        "price": 1,
    }


async def books(database: str) -> Engine:
    """Two securities in two portfolios, two dates closed, all valued."""
    engine = await Engine.on(database)
    await engine.take("business-dates", [{"business_date": day} for day in (DAYS[0], DAYS[2])])
    await engine.take("transactions", [trade(f"{p}{s}", p, s) for p in "QP" for s in "BA"])
    await engine.take("prices", [{"security_id": s, "price_date": d, "price": 2} for s in "BA" for d in DAYS])
    await engine.drain()
    return engine


async def late_prices(engine: Engine, price: int) -> None:
    """A correction for each security; its job has been sent."""
    await engine.take("prices", [{"security_id": s, "price": price, **LATE, "revision": price} for s in "BA"])
    await engine.relay()


async def do_everything(engine: Engine) -> None:
    """Every kind of transaction that locks more than one row."""
    async with engine.pool.acquire() as connection:

        async def once(work: Any) -> Any:
            async with connection.transaction():
                return await work

        await late_prices(engine, 3)
        await engine.open_jobs()
        small = sorted(engine.running, key=lambda job: job.job_id)
        await once(resets.reset_small(connection, small))
        engine.running.clear()
        await engine.drain()

        await late_prices(engine, 4)
        await engine.open_jobs()
        again = [(await operations.show_job(connection, job.job_id)) for job in engine.running]
        failed, cancelled = engine.running
        engine.running.clear()
        await operations.prioritise_job(connection, "me", failed.job_id, 3)
        await once(resets.reset_chunk(connection, failed, 1))
        (failed,) = await resets.read(connection, [failed.job_id])
        await once(resets.note_attempt(connection, failed, "no luck", 0.0))
        await once(resets.fail(connection, failed, "no luck"))
        await operations.cancel_job(connection, "me", cancelled.job_id)
        for job in again:
            await operations.requeue_job(connection, "me", job["job_id"])
        await engine.drain()

        await operations.reprocess(connection, "me", EARLY, security_id="A")
        await operations.reprocess(connection, "me", LATER, portfolio_id="P")
        await engine.drain()
        await engine.take("business-dates", [{"business_date": DAYS[1]}])
        await engine.take("transactions", [trade(f"late{p}{s}", p, s, DAYS[0]) for p in "QP" for s in "BA"])
        await engine.take("transactions", [trade("new", "R", "A"), {**trade("PA", "Q", "B"), "revision": 2}])
        await engine.drain()

        await late_prices(engine, 6)
        jobs = list(engine.jobs)
        await engine.open_jobs()
        await connection.execute("update corrections set reset_at = clock_timestamp() where reset_at is null")
        engine.jobs.extend(jobs)
        await engine.open_jobs()  # they are needless by now
        engine.running.clear()

        engine.debounce = corrections.Debounce(0.0, 0.0)
        await late_prices(engine, 7)
        await engine.reissue()
        await once(repairs.revalue(connection, "me", [("B", EARLY), ("A", EARLY)]))
        await once(repairs.rebuild(connection, "me", [("B", "Q"), ("A", "P")], "FIFO"))
        await engine.drain()


async def test_every_transaction_takes_its_locks_in_one_order(recorder: Recorder, database: str) -> None:
    engine = await books(database)
    await do_everything(engine)
    await engine.pool.close()
    assert not recorder.wrong, "\n".join(recorder.wrong)
    assert recorder.transactions > 40


async def test_a_transaction_that_takes_them_in_another_order_is_found(recorder: Recorder, database: str) -> None:
    engine = await books(database)
    async with engine.pool.acquire() as connection, connection.transaction():
        await corrections.hold_securities(connection, ["A"])
        await connection.execute("select from position_state where security_id = 'A' for no key update")
    await engine.pool.close()
    assert [line.split(" after ")[0] for line in recorder.wrong] == [
        "position_state['A', 'P']",
        "position_state['A', 'Q']",
    ]
