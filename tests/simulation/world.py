"""A whole topology on the models: the workload, the workers, and what befalls them. One run is one list of choices.

Any worker may be killed at any step, or replaced while it still believes to be the owner (a zombie); sessions are cut,
commits end in doubt, deadlocks strike, records come twice, logs are compacted. Afterwards the books must be right.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg

from sinks.batches import Batch
from sinks.model import Job, Price, Transaction
from sinks.offsets import Fenced
from tables import triggers
from tests.simulation.books import Books, Event, Guards, Processed, Status
from tests.simulation.herd import resets
from tests.simulation.kafka import Broker, Record
from tests.simulation.ledger import Connection, ledger
from tests.simulation.postgres import Database
from tests.simulation.scheduler import Choices, Process, Scheduler, pause, until

FIRST_DAY = date(2025, 1, 1)
NOW = datetime(2025, 1, 1, tzinfo=UTC)
STEPS = 4_000
_PORTFOLIOS = ("P", "Q")
_SECURITIES = ("S", "S", "T")  # mostly one, so that records meet
_KINDS = ("BUY", "SELL", "SPLIT", "DIVIDEND")


@dataclass
class Faults:
    """How many of each a run may see."""

    kills: int = 2
    zombies: int = 2
    stalls: int = 3
    doubts: int = 2
    deadlocks: int = 2
    compactions: int = 2
    lossy: bool = True
    """Whether the trigger agent may have zombies too: what they spoil, the repair of corrections must heal."""


@dataclass
class Member:
    """A worker's place in its group; a worker that is no longer the current one learns it at its next fetch."""

    start: Callable[[Member], Coroutine[Any, Any, None]]
    generation: int = 0
    process: Process | None = None


@dataclass
class World:
    """Everything there is in one run."""

    choices: Choices
    guards: Guards = field(default_factory=Guards)
    faults: Faults = field(default_factory=Faults)
    feed_back: bool = True
    """Whether replayed transactions are sent to the input topic again, as a careless operator might."""
    read_ahead: bool = True
    """Whether the watermark sink may read more jobs before it is done with those that it has."""
    deadlock_is_poison: bool = False
    victims: Sequence[str] = ()
    """Which workers faults may strike; none named: any."""

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.choices)
        self.database = Database()
        self.database.doubt = self._doubt
        self.books = Books(self.database, self.guards)
        self.broker = Broker(
            {
                "business-dates": 1,
                "prices": 1,
                "transactions": 2,
                "reprocessing-triggers": 1,
                "reprocessing-status": 1,
                "reprocessing-jobs": 1,
                "transactions-processed": 1,
                "changelog": 1,
            }
        )
        self.sent: list[tuple[str, Any]] = []
        self.relay_session: object | None = None
        self.repairs = 0
        self._lost = False
        self._next_fault = self.choices.draw(80)
        self.members: dict[str, Member] = {}

    # -- a run -----------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Until nothing is left to do; False when that does not come."""
        self._load()
        for topic, partition, effect in (
            ("business-dates", 0, self._close_dates),
            ("prices", 0, self._store_prices),
            ("transactions", 0, self._book),
            ("transactions", 1, self._book),
        ):
            self._join(f"{topic}-{partition}", lambda m, t=topic, p=partition, e=effect: self._sink(m, t, p, e))
        self._join("resets", lambda member: resets(self, member))
        self._join("triggers", self._triggers)
        self._join("relay", self._relay)
        self._join("valuation-1", self._valuation)
        self._join("valuation-2", self._valuation)
        while True:
            if not self.scheduler.run(STEPS, self._befall):
                return False
            if not self._needs_repair() or self.repairs == 3:
                return True
            self.repairs += 1
            self.scheduler.spawn("repair", self._repair())

    def _join(self, name: str, start: Callable[[Member], Coroutine[Any, Any, None]]) -> None:
        self.members[name] = member = Member(start)
        member.process = self.scheduler.spawn(name, start(member))

    def _needs_repair(self) -> bool:
        return self._lost and any(c.is_open for c in self.database.tables["corrections"].values())

    async def _repair(self) -> None:
        async with self.database.transaction() as tx:
            await self.books.reissue(tx)

    # -- the workload ----------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """A few records of each topic; what is late is decided by who is faster."""
        choices = self.choices
        days = [FIRST_DAY + timedelta(days=n) for n in range(3 + choices.draw(2))]
        order = list(days)
        if choices.chance(4):
            order[0], order[1] = order[1], order[0]
        for day in order:
            self._send("business-dates", day)
        for number in range(1 + choices.draw(4)):
            day, security = choices.pick(days[:3]), choices.pick(_SECURITIES)
            self._send("prices", Price(security, day, Decimal(10 + number), revision=choices.draw(2)))
        for number in range(1 + choices.draw(4)):
            revision = choices.draw(2)
            trade = self._trade(f"t{number}", days, revision)
            self._send("transactions", trade)
            if choices.chance(3):
                self._send("transactions", self._trade(f"t{number}", days, revision + 1, cancelled=choices.chance(3)))
            if choices.chance(4):
                self._send("transactions", trade)

    def _trade(self, id_: str, days: Sequence[date], revision: int, *, cancelled: bool = False) -> Transaction:
        choices = self.choices
        day = choices.pick(days)
        return Transaction(
            id_,
            choices.pick(_PORTFOLIOS),
            choices.pick(_SECURITIES),
            datetime(day.year, day.month, day.day, choices.draw(3), tzinfo=UTC),
            choices.pick(_KINDS),
            Decimal(2 * (1 + choices.draw(2))),
            Decimal(5),
            Decimal(10 * (1 + choices.draw(3))),
            revision=revision,
            cancelled=cancelled,
        )

    def _send(self, topic: str, value: Any) -> None:
        self.sent.append((topic, value))
        partition = self.choices.draw(self.broker.partitions[topic]) if topic == "transactions" else 0
        self.broker.logs[topic, partition].append(None, value)

    # -- what befalls it -------------------------------------------------------------------------------------------

    def _befall(self) -> None:
        faults = self.faults
        if self.scheduler.steps < self._next_fault:
            return
        self._next_fault = self.scheduler.steps + 1 + self.choices.draw(80)
        match self.choices.draw(4):
            case 3 if faults.stalls:
                faults.stalls -= 1
                self._stall(self.members[self._victim()])
            case 0 if faults.kills:
                faults.kills -= 1
                self._replace(self._victim(), kill=True)
            case 1 if faults.zombies:
                faults.zombies -= 1
                self._replace(self._victim(), kill=False)
            case 2 if faults.compactions:
                faults.compactions -= 1
                log = self.broker.logs[self.choices.pick(("reprocessing-jobs", "changelog")), 0]
                log.compact(log.end)

    def _victim(self) -> str:
        return self.choices.pick(self.victims or tuple(self.members))

    def _replace(self, name: str, *, kill: bool) -> None:
        """A new member takes over; the old one is dead, or does not know yet."""
        member = self.members[name]
        assert member.process is not None
        if not kill and name == "triggers":
            if not self.faults.lossy:
                return
            self._lost = True
        if kill:
            member.process.kill()
        else:
            self._stall(member)
        if name == "relay":
            self.relay_session = None  # the server has ended the session, even if its client still publishes
        member.generation += 1
        member.process = self.scheduler.spawn(name, member.start(member))

    def _stall(self, member: Member) -> None:
        """It does nothing for so many steps, as under SIGSTOP; if all the others wait, it goes on."""
        assert member.process is not None
        member.process.asleep_until = self.scheduler.steps + 20 + self.choices.draw(200)

    def _doubt(self) -> str | None:
        if not self.faults.doubts or not self.choices.chance(60):
            return None
        self.faults.doubts -= 1
        return self.choices.pick(("lost", "done"))

    async def more(self, member: Member, generation: int, ready: Callable[[], bool]) -> bool:
        """Wait for records; False for a worker that is told that the partition is another's."""
        await until(lambda: ready() or member.generation != generation)
        await pause()
        return member.generation == generation

    def rejoin(self, member: Member, generation: int) -> None:
        """Fenced by a claim that came late, from a worker that is no longer the owner: claim again."""
        if self.guards.rejoin and member.generation == generation:
            member.process = self.scheduler.spawn("rejoined", member.start(member))

    # -- exactly-once sinks ----------------------------------------------------------------------------------------

    async def _sink(self, member: Member, topic: str, partition: int, effect: Any) -> None:
        generation = member.generation
        offsets = ledger(self.database, "intake", fenced=self.guards.fence)
        log = self.broker.logs[topic, partition]
        claim = (await offsets.claim({(topic, partition): 0}))[topic, partition]
        offsets.check((topic, partition), claim.next_offset, 0, log.end)
        position = claim.next_offset
        while await self.more(member, generation, lambda at=position: log.end > at):
            records = log.read(position, 1 + self.choices.draw(3))
            batch = Batch(topic, partition, claim.epoch, position, records)
            try:
                await offsets.apply(batch, effect, self._refuse)
            except Fenced:
                return self.rejoin(member, generation)
            position = batch.next_offset

    async def _refuse(self, connection: Any, record: Any, detail: str) -> None:
        """A dead letter."""

    async def _close_dates(self, connection: Connection, records: Sequence[Record]) -> None:
        await self.books.close_dates(connection.tx, [record.value for record in records])

    async def _store_prices(self, connection: Connection, records: Sequence[Record]) -> None:
        await self.books.store_prices(connection.tx, [record.value for record in records])

    async def _book(self, connection: Connection, records: Sequence[Record]) -> None:
        if self.faults.deadlocks and self.choices.chance(20):
            self.faults.deadlocks -= 1
            if self.deadlock_is_poison:
                raise asyncpg.DataError("deadlock detected")
            raise asyncpg.DeadlockDetectedError("deadlock detected")
        await self.books.book(connection.tx, [(record.offset, record.value) for record in records])

    # -- triggers, relay, valuation --------------------------------------------------------------------------------

    async def _triggers(self, member: Member) -> None:
        """Publish, wait for the ack, write the table, and only then commit the offset, now and then."""
        generation, broker = member.generation, self.broker
        table: dict[bytes, triggers.Entry] = {r.key: r.value for r in broker.logs["changelog", 0].records}
        table = {key: entry for key, entry in table.items() if entry is not None}
        topics = ("reprocessing-triggers", "reprocessing-status")
        places = {topic: broker.committed["triggers", topic, 0] for topic in topics}

        def waiting() -> list[str]:
            return [topic for topic in topics if broker.logs[topic, 0].end > places[topic]]

        while await self.more(member, generation, lambda: bool(waiting())):
            topic = self.choices.pick(waiting())
            (record,) = broker.logs[topic, 0].read(places[topic], 1)
            before = table.get(record.key)
            if topic == topics[0]:
                decision = triggers.on_trigger(before, triggers.Trigger(*record.value), NOW)
            else:
                decision = triggers.on_status(before, triggers.Status(*record.value[:3]), NOW)
            if decision.publish or decision.release:
                await pause()
                job = decision.publish
                broker.send("reprocessing-jobs", record.key, Job(*_fields(job)) if job else None)
            if decision.entry != before:
                await pause()
                broker.send("changelog", record.key, decision.entry)
                table.pop(record.key, None)
                if decision.entry is not None:
                    table[record.key] = decision.entry
            places[topic] = record.offset + 1
            if self.choices.draw(2) == 0 and member.generation == generation:
                for name, offset in places.items():
                    broker.committed["triggers", name, 0] = offset

    async def _relay(self, member: Member) -> None:
        """In order per key; deletes what the broker acked, so that a crash between publishes again."""
        me = self.relay_session = object()
        outbox = self.database.tables["outbox"]
        while True:
            await until(lambda: bool(outbox) or self.relay_session is not me)
            await pause()
            if self.relay_session is not me:
                return
            events = sorted(outbox.items())[: 1 + self.choices.draw(4)]
            if not self.guards.publish_in_order:
                events.reverse()
            if not self.guards.publish_before_delete:
                self._remove(events)
            for number, event in events:
                await pause()
                self._publish(number, event)
            await pause()
            if self.relay_session is not me:
                return
            self._remove(events)

    def _remove(self, events: Sequence[tuple[int, Event]]) -> None:
        for number, _ in events:
            self.database.tables["outbox"].pop(number, None)

    def _publish(self, number: int, event: Event) -> None:
        if isinstance(event.value, Processed):
            self.broker.send(event.topic, event.key.encode(), (number, event.value))
            transaction = self.database.tables["transactions"].get(event.value.transaction_id)
            if self.feed_back and transaction and event.value.epoch and not transaction.cancelled:
                self.broker.logs["transactions", number % 2].append(None, transaction)
            return
        self.broker.send(event.topic, event.key.encode(), event.value)

    async def _valuation(self, member: Member) -> None:
        generation, seen = member.generation, -1
        while member.generation == generation:
            await until(lambda: self.database.changes != seen or member.generation != generation)  # noqa: B023
            await pause()
            seen = self.database.changes
            try:
                if await self.books.value(1 + self.choices.draw(3)):
                    seen = -1
            except (asyncpg.ConnectionDoesNotExistError, asyncpg.DeadlockDetectedError):
                seen = -1


def _fields(job: triggers.Job) -> tuple[Any, ...]:
    return (job.job_id, job.security_id, job.earliest_impacted_date, job.seq, job.created_at)


__all__ = ["Faults", "Guards", "Status", "World"]
