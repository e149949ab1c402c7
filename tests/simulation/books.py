"""The sinks on the model of Postgres: statement by statement what their SQL does, with the same locks in their order.

What is pure in the engine (folding revisions, what a batch touches, whether a key is rebuilt, which price wins) is the
engine's own code. Each guard that can be taken out stands where the SQL has it; `traps.py` says what it is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from types import SimpleNamespace
from typing import Any, NamedTuple

from sinks import booking, prices, revisions
from sinks.model import CostBasisMethod, Job, Price, Transaction
from sinks.transactions import Change
from tests.costs import costs
from tests.simulation.postgres import Database
from tests.simulation.postgres import Transaction as Tx
from tidemark.oracle import HistoryRow, SnapshotRow
from tidemark.oracle import Price as OraclePrice
from tidemark.oracle.books import position_snapshots

Key = tuple[str, str]
"""(security_id, portfolio_id)."""

DAY = timedelta(days=1)
METHOD: CostBasisMethod = "FIFO"
TERMINAL = frozenset({"COMPLETE", "FAILED", "CANCELLED"})


@dataclass
class Guards:
    """What keeps the books right, each to be taken out on its own."""

    lock_first: bool = True
    value_in_one_transaction: bool = True
    read_prices_after_lock: bool = True
    raise_only_when_none_is_behind: bool = True
    calendar_lock: bool = True
    calendar_lock_when_booking: bool = True
    fence: bool = True
    rejoin: bool = True
    publish_in_order: bool = True
    publish_before_delete: bool = True


class State(NamedTuple):
    epoch: int
    watermark: date
    status: str = "CURRENT"
    reset_seq: int | None = None


class Correction(NamedTuple):
    security: str
    earliest: date
    reason: str
    job_id: int | None = None
    is_reset: bool = False
    is_right: bool = False

    @property
    def is_open(self) -> bool:
        return not self.is_reset and not self.is_right


class JobRow(NamedTuple):
    security: str
    earliest: date
    seq: int
    status: str
    cursor: str = ""


class Event(NamedTuple):
    topic: str
    key: str
    value: Any


class Status(NamedTuple):
    job_id: int
    security_id: str
    status: str


class Processed(NamedTuple):
    key: Key
    epoch: int
    sequence: int
    transaction_id: str | None
    count: int = 0


class Books:
    """The tables, and each sink's effect within a transaction."""

    def __init__(self, database: Database, guards: Guards) -> None:
        self.database = database
        self.guards = guards

    # -- corrections and the outbox --------------------------------------------------------------------------------

    def emit(self, tx: Tx, topic: str, key: str, value: Any) -> None:
        """Into the outbox, with the next id."""
        tx.append("outbox", self.database.next_value("outbox"), Event(topic, key, value))

    async def lock_securities(self, tx: Tx, securities: Iterable[str]) -> None:
        for security in sorted(set(securities)):
            await tx.statement()
            await tx.insert("securities", security, date.min)
            await tx.lock("securities", security)

    async def issue(self, tx: Tx, late: Sequence[tuple[str, date]], reason: str) -> None:
        """Corrections with their triggers."""
        if not late:
            return
        await self.lock_securities(tx, [security for security, _ in late])
        await tx.statement()
        for security, day in sorted(late):
            seq = self.database.next_value("correction")
            tx.append("corrections", seq, Correction(security, day, reason))
            self.emit(tx, "reprocessing-triggers", security, (security, day, seq, reason))

    async def reissue(self, tx: Tx) -> None:
        """A repair trigger for every security whose corrections wait."""
        await tx.statement()
        waiting: dict[str, list[tuple[int, date]]] = {}
        for seq, c in tx.scan("corrections").items():
            if c.is_open:
                waiting.setdefault(c.security, []).append((seq, c.earliest))
        await self.lock_securities(tx, waiting)
        for security, rows in waiting.items():
            first, last = min(day for _, day in rows), max(seq for seq, _ in rows)
            self.emit(tx, "reprocessing-triggers", security, (security, first, last, "repair"))

    async def settle(self, tx: Tx, securities: Iterable[str]) -> int:
        """Corrections whose keys are all valued are right. The caller holds the securities."""
        await tx.statement()
        states, settled = tx.scan("position_state"), 0
        for security in securities:
            waiting = [s.reset_seq for (sec, _), s in states.items() if sec == security and s.reset_seq is not None]
            for seq, c in sorted(tx.scan("corrections").items()):
                if c.security == security and c.is_reset and not c.is_right and min(waiting, default=seq + 1) > seq:
                    tx.put("corrections", seq, c._replace(is_right=True), guard=("securities", security))
                    status = Status(c.job_id or seq, security, "BOOKS_RIGHT")
                    self.emit(tx, "reprocessing-status", security, status)
                    settled += 1
        return settled

    # -- calendar and prices ---------------------------------------------------------------------------------------

    def latest(self, tx: Tx) -> date | None:
        return max(tx.scan("business_dates"), default=None)

    async def close_dates(self, tx: Tx, days: Sequence[date]) -> None:
        await tx.statement()
        if self.guards.calendar_lock:
            await tx.lock_advisory("calendar", shared=False)
        await tx.statement()
        before = self.latest(tx)
        closed = [day for day in sorted(set(days)) if await tx.insert("business_dates", day, True)]
        repaired = [day for day in closed if before is not None and day < before]
        if repaired:
            securities = sorted({security for security, _ in tx.scan("position_state")})
            await self.issue(tx, [(security, min(repaired)) for security in securities], "calendar")

    async def store_prices(self, tx: Tx, batch: Sequence[Price]) -> None:
        await tx.statement()
        if self.guards.calendar_lock:
            await tx.lock_advisory("calendar", shared=True)
        await tx.statement()
        latest = self.latest(tx)
        late: dict[str, date] = {}
        await tx.statement()
        for price in sorted(prices.winners(batch), key=lambda p: (p.security_id, p.price_date)):
            identity = (price.security_id, price.price_date)
            if await tx.insert("market_prices", identity, price):
                changed = True
            else:
                await tx.lock("market_prices", identity)
                stored = tx.get("market_prices", identity)
                if price.revision < stored.revision:
                    continue
                tx.put("market_prices", identity, price)
                changed = price.price != stored.price
            if changed and latest is not None and price.price_date <= latest:
                late[price.security_id] = min(late.get(price.security_id, price.price_date), price.price_date)
        await self.issue(tx, list(late.items()), "price")

    # -- positions -------------------------------------------------------------------------------------------------

    async def book(self, tx: Tx, batch: Sequence[tuple[int, Transaction]]) -> None:
        await tx.statement()
        if self.guards.calendar_lock and self.guards.calendar_lock_when_booking:
            await tx.lock_advisory("calendar", shared=True)
        touches = booking.touches(await self._store(tx, batch))
        if not touches:
            return
        created = set()
        await tx.statement()
        for key, touch in touches.items():
            if touch.arrivals:
                first = State(0, touch.arrivals[0].position_date - DAY)
                if await tx.insert("position_state", key, first):
                    created.add(key)
        await tx.statement()
        for key in touches:
            await tx.lock("position_state", key)
        await tx.statement()
        lowered: dict[str, date] = {}
        rebuilt: dict[Key, date] = {}
        moved: dict[Key, State] = {}
        for key, touch in touches.items():
            state: State = tx.get("position_state", key)
            watermark, day = self._book_key(tx, key, state, touch)
            if key in created or watermark < state.watermark:
                lowered[key[0]] = min(lowered.get(key[0], watermark), watermark)
            if day:
                rebuilt[key] = day
            moved[key] = state._replace(epoch=state.epoch + bool(day), watermark=watermark)
        await self._move(tx, moved, lowered, rebuilt)

    async def _store(self, tx: Tx, batch: Sequence[tuple[int, Transaction]]) -> list[Change]:
        versions: dict[str, list[tuple[int, Transaction]]] = {}
        for number, transaction in batch:
            versions.setdefault(transaction.transaction_id, []).append((number, transaction))
        changes = []
        for id_ in sorted(versions):
            await tx.statement()
            winner = revisions.fold(None, versions[id_]).winner
            if winner and await tx.insert("transactions", id_, winner):
                changes.append(Change(None, winner))
                continue
            await tx.lock("transactions", id_)
            old = tx.get("transactions", id_)
            if winner := revisions.fold(old, versions[id_]).winner:
                tx.put("transactions", id_, winner)
                changes.append(Change(old, winner))
        return changes

    def _book_key(self, tx: Tx, key: Key, state: State, touch: Any) -> tuple[date, date | None]:
        """Write the history; returns the watermark, and after a rebuild the day from which it is wrong."""
        live: tuple[Transaction, ...] = tx.get("history", key) or ()
        tail = SimpleNamespace(sequence=len(live), order=live[-1].order, state=()) if live else None
        stored = SimpleNamespace(epoch=state.epoch, watermark=state.watermark, tail=tail, is_new=False)
        if not booking.needs_rebuild(stored, touch):
            tx.put("history", key, (*live, *touch.arrivals), guard=("position_state", key))
            for place, transaction in enumerate(touch.arrivals, len(live) + 1):
                self._publish(tx, Processed(key, state.epoch, place, transaction.transaction_id))
            return min(state.watermark, touch.arrivals[0].position_date - DAY), None
        places = [arrival.order for arrival in touch.arrivals[:1]]
        first = min(places if touch.corrected is None else [touch.corrected, *places])
        live = tuple(
            sorted(
                (t for t in tx.scan("transactions").values() if t.key == key and not t.cancelled), key=lambda t: t.order
            )
        )
        tx.put("history", key, live, guard=("position_state", key))
        self._publish(tx, Processed(key, state.epoch + 1, 0, None, len(live)))
        for place, transaction in enumerate(live, 1):
            self._publish(tx, Processed(key, state.epoch + 1, place, transaction.transaction_id))
        day = first[0].date()
        return min(state.watermark, day - DAY), day

    def _publish(self, tx: Tx, event: Processed) -> None:
        self.emit(tx, "transactions-processed", f"{event.key[1]}|{event.key[0]}", event)

    async def _move(self, tx: Tx, moved: dict[Key, State], lowered: dict[str, date], rebuilt: dict[Key, date]) -> None:
        first: dict[str, date] = {}
        for (security, _), day in rebuilt.items():
            first[security] = min(first.get(security, day), day)
        await self.lock_securities(tx, [*lowered, *first])
        await tx.statement()
        seqs = {}
        for security, day in sorted(first.items()):
            seqs[security] = self.database.next_value("correction")
            tx.append("corrections", seqs[security], Correction(security, day, "transaction", is_reset=True))
        latest = self.latest(tx) or date.min
        for key, state in moved.items():
            if key in rebuilt and state.watermark < latest:
                seq = seqs[key[0]]
                state = state._replace(status="REPROCESSING", reset_seq=min(state.reset_seq or seq, seq))
            tx.put("position_state", key, state)
        for security, day in lowered.items():
            tx.put("securities", security, min(tx.get("securities", security), day))

    # -- the watermark sink ----------------------------------------------------------------------------------------

    async def open_jobs(self, tx: Tx, jobs: Sequence[Job]) -> list[tuple[int, JobRow]]:
        """Record and start the jobs; answer each with its status."""
        await tx.statement()
        for job in sorted(jobs, key=lambda j: j.job_id):
            row = JobRow(job.security_id, job.earliest_impacted_date, job.seq, "PENDING")
            await tx.insert("jobs", job.job_id, row)
        await self.lock_securities(tx, [job.security_id for job in jobs])
        await tx.statement()
        for job in jobs:
            row = tx.get("jobs", job.job_id)
            if row.status == "PENDING":
                await tx.lock("jobs", job.job_id)
                covered = self._covered(tx, row)
                for seq, c in covered:
                    tx.put("corrections", seq, c._replace(job_id=job.job_id), guard=("securities", row.security))
                tx.put("jobs", job.job_id, row._replace(status="PROCESSING" if covered else "COMPLETE"))
            self._announce(tx, job.job_id)
        return [(job_id, tx.get("jobs", job_id)) for job_id in sorted(job.job_id for job in jobs)]

    async def reset_chunk(self, tx: Tx, job_id: int, job: JobRow, scan: int) -> JobRow | None:
        """The holders among the next keys; None when the job is not where it was read."""
        await tx.statement()
        ahead = sorted(p for s, p in tx.scan("position_state") if s == job.security and p > job.cursor)
        boundary = ahead[scan - 1] if len(ahead) >= scan else None
        await tx.statement()
        await tx.lock("jobs", job_id)
        stored = tx.get("jobs", job_id)
        if self.guards.fence and (stored.cursor != job.cursor or stored.status != "PROCESSING"):
            return None
        start, job = job.cursor, job._replace(cursor=boundary or job.cursor)
        tx.put("jobs", job_id, job)
        await tx.statement()
        smallest = min((seq for seq, _ in self._covered(tx, job)), default=job.seq)
        before = job.earliest - DAY

        def reached(key: Key, state: State) -> bool:
            security, portfolio = key
            if security != job.security or not start < portfolio <= (boundary or portfolio):
                return False
            if not self.guards.lock_first and state.watermark <= before:
                return False
            return self._affected(tx, key, job.earliest)

        await tx.update(
            "position_state",
            reached,
            lambda _, s: State(
                s.epoch,
                min(s.watermark, before),
                "REPROCESSING",
                smallest if s.reset_seq is None else min(s.reset_seq, smallest),
            ),
        )
        await self.lock_securities(tx, [job.security])
        await tx.statement()
        tx.put("securities", job.security, min(tx.get("securities", job.security), before))
        if boundary is None:
            job = job._replace(status="COMPLETE")
            tx.put("jobs", job_id, job)
            for seq, c in self._covered(tx, job):
                tx.put("corrections", seq, c._replace(is_reset=True), guard=("securities", job.security))
            self._announce(tx, job_id)
        return job

    def _covered(self, tx: Tx, job: JobRow) -> list[tuple[int, Correction]]:
        return [
            (seq, c)
            for seq, c in tx.scan("corrections").items()
            if c.security == job.security and seq <= job.seq and c.earliest >= job.earliest and c.is_open
        ]

    def _affected(self, tx: Tx, key: Key, day: date) -> bool:
        """It moved on or after the day, or held something before."""
        live = tx.get("history", key) or ()
        if any(t.position_date >= day for t in live):
            return True
        return bool(live) and costs(live, METHOD)[-1][0] != 0

    def _announce(self, tx: Tx, job_id: int) -> None:
        job = tx.get("jobs", job_id)
        self.emit(tx, "reprocessing-status", job.security, Status(job_id, job.security, job.status))

    # -- the valuation ---------------------------------------------------------------------------------------------

    async def value(self, keys: int) -> int:
        """One pass; returns how many keys it valued and corrections it settled."""
        async with self.database.transaction() as tx:
            await tx.statement()
            latest = self.latest(tx)
            if latest is None:
                return 0
            await tx.statement()
            due = sorted(s for s, through in tx.scan("securities").items() if through < latest)
        claimed, full = await self._value_due(due, latest, keys)
        if full:
            return len(claimed)
        done = due
        if not claimed:
            async with self.database.transaction() as tx:
                await tx.statement()
                unsettled = {c.security for c in tx.scan("corrections").values() if c.is_reset and not c.is_right}
            done = sorted({*due, *unsettled})
        if not done:
            return len(claimed)
        async with self.database.transaction() as tx:
            await self.lock_securities(tx, done)
            await tx.statement()
            states = tx.scan("position_state")
            for security in done:
                behind = any(s == security and state.watermark < latest for (s, _), state in states.items())
                if tx.get("securities", security) < latest and not (
                    behind and self.guards.raise_only_when_none_is_behind
                ):
                    tx.put("securities", security, latest)
            return len(claimed) + await self.settle(tx, done)

    async def _value_due(self, due: Sequence[str], latest: date, keys: int) -> tuple[list[Key], bool]:
        stale: dict[Any, Price] = {}
        if not self.guards.read_prices_after_lock:
            async with self.database.transaction() as tx:
                await tx.statement()
                stale = tx.scan("market_prices")
        written: dict[Key, Any] = {}
        async with self.database.transaction() as tx:
            await tx.statement()
            claimed: list[Key] = []
            for key, state in sorted(tx.scan("position_state").items()):
                if (
                    key[0] in due
                    and state.watermark < latest
                    and len(claimed) < keys
                    and tx.try_lock("position_state", key)
                ):
                    claimed.append(key)
            await tx.statement()
            for key in claimed:
                written[key] = self._revalued(tx, key, latest, stale)
                if self.guards.value_in_one_transaction:
                    self._advance(tx, key, latest, written[key])
            await tx.statement()
        if not self.guards.value_in_one_transaction:
            async with self.database.transaction() as tx:
                await tx.statement()
                for key in claimed:
                    await tx.lock("position_state", key)
                    self._advance(tx, key, latest, written[key])
        return claimed, len(claimed) == keys

    def _advance(self, tx: Tx, key: Key, latest: date, snapshots: dict[date, SnapshotRow]) -> None:
        tx.put("snapshots", key, snapshots, guard=("position_state", key))
        tx.put("position_state", key, State(tx.get("position_state", key).epoch, latest))

    def _revalued(self, tx: Tx, key: Key, latest: date, stale: dict[Any, Price]) -> dict[date, SnapshotRow]:
        """The key's snapshots with those after the watermark recomputed, up to L."""
        watermark = tx.get("position_state", key).watermark
        quotes = stale or tx.scan("market_prices")
        kept = {day: row for day, row in (tx.get("snapshots", key) or {}).items() if day <= watermark}
        of_security = [
            OraclePrice(*identity, p.price) for identity, p in sorted(quotes.items()) if identity[0] == key[0]
        ]
        calendar = sorted(day for day in tx.scan("business_dates") if day <= latest)
        rows = position_snapshots(self.history(tx, key), of_security, calendar)
        return kept | {row.valuation_date: row for row in rows if row.valuation_date > watermark}

    def history(self, tx: Tx, key: Key) -> list[HistoryRow]:
        """The key's live rows, costed in the order in which they stand."""
        live: tuple[Transaction, ...] = tx.get("history", key) or ()
        return [
            HistoryRow(t.transaction_id, t.position_date, place, *figures)
            for place, (t, figures) in enumerate(zip(live, costs(live, METHOD), strict=True), 1)
        ]
