"""Send mutated records to a topology, and judge what became of each one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from random import Random
from typing import Any

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from confluent_kafka import Producer

from sinks.database import connect
from streams import internal, records, topics
from streams.lag import OWNED_BY_POSTGRES, read_lag, topics_by_group
from streams.records import Rejected
from streams.settings import Settings
from tables.triggers import Entry
from tests.exported import exported
from tests.fuzz import batches
from tests.fuzz.mutations import CODECS, Message, calendar, messages
from tests.reading import read_all
from tests.topology import Topology, partitions, until

_INTERNAL: dict[str, Callable[[bytes | None], Any]] = {
    topics.TRIGGERS: internal.decode_trigger,
    topics.STATUS: internal.decode_status,
    topics.JOBS: internal.decode_job,
}
_INPUTS: dict[str, Callable[[bytes | None], Any]] = {
    topics.BUSINESS_DATES: records.decode_business_date,
    topics.PRICES: records.decode_price,
    topics.TRANSACTIONS: records.decode_transaction,
}
_LARGEST = 2_000_000
_BOMB, _LARGEST_BOMB = 64 * 2**20, 600 * 2**20
_MOST_MEMORY = 512  # MiB; the manifests' limit is 1 GiB


@dataclass
class Sent:
    """What the broker has, by its place; what was aborted is not in it."""

    at: dict[tuple[str, int, int], Message] = field(default_factory=dict)
    aborted: list[Message] = field(default_factory=list)

    def of(self, names: Iterable[str]) -> list[tuple[tuple[str, int, int], Message]]:
        return [(place, message) for place, message in self.at.items() if place[0] in names]


class Fuzz:
    """One run against a topology of all roles."""

    def __init__(self, topology: Topology, seed: int) -> None:
        self._topology = topology
        self._settings: Settings = topology.settings
        self._partitions = partitions(topology.settings)
        self._random = Random(seed)
        self._sent = Sent()
        self._number = 0
        self._producers: dict[str, Producer] = {}

    async def send(self, count: int) -> None:
        """Mutated and good records in any order: by producers of every codec, and in transactions."""
        if not self._sent.at:
            self._produce(calendar())
            await self._topology.pool.execute(
                "alter table corrections alter reissue_at set default clock_timestamp() + interval '3 seconds'"
            )
        waiting = messages(self._random, count)
        while waiting:
            chosen, waiting = waiting[:500], waiting[500:]
            if self._random.random() < 0.3:
                self._transaction(chosen[:50], commits=self._number % 2 == 1)
                chosen = chosen[50:]
            self._produce(chosen)
        await self._raw()

    async def finish(self) -> None:
        """A good record at the end of each partition, and everything is to come to its end."""
        for topic in (*_INPUTS, *_INTERNAL):
            for partition in range(self._partitions[self._settings.topic(topic)]):
                self._produce([_last(topic)], partition)
        await until(self._at_the_end, "every role's offset at the end of each log")
        await until(self._nothing_left, "nothing left to do")

    @property
    def aborted(self) -> int:
        """How many records transactions have taken back."""
        return len(self._sent.aborted)

    def markers_last(self) -> None:
        """Transactions, committed and aborted, whose markers are the last of each log."""
        for commits in (True, False):
            for partition in range(2):
                there = [topic for topic in _INPUTS if partition < self._partitions[self._settings.topic(topic)]]
                self._transaction([_last(topic) for topic in there], commits, partition)

    # -- sending ---------------------------------------------------------------------------------------------------

    def _producer(self, codec: str = "none", **more: Any) -> Producer:
        return Producer({
            "bootstrap.servers": self._settings.bootstrap_servers, "compression.type": codec, "linger.ms": 5,
            "message.max.bytes": _LARGEST, "partitioner": "murmur2_random", "log_level": 0, **more,
        })  # fmt: skip

    def _produce(self, chosen: Sequence[Message], partition: int = -1) -> None:
        for codec in CODECS:
            if some := [message for message in chosen if message.codec == codec]:
                producer = self._producers.setdefault(codec, self._producer(codec))
                self._hand_over(producer, some, self._sent.at, partition)
                assert producer.flush(60) == 0

    def _hand_over(
        self,
        producer: Producer,
        chosen: Sequence[Message],
        into: dict[tuple[str, int, int], Message],
        partition: int = -1,
    ) -> None:
        for message in chosen:

            def told(error: Any, found: Any, message: Message = message) -> None:
                assert error is None, error
                into[message.topic, found.partition(), found.offset()] = message

            key = message.key
            if key is None and message.topic not in (*_INPUTS, topics.TRIGGERS, topics.STATUS, topics.DEAD_LETTERS):
                key = b""  # the broker refuses a batch of a compacted topic that has a record without a key
            producer.produce(
                self._settings.topic(message.topic), message.value, key, partition, told,
                headers=message.headers,
            )  # fmt: skip
            producer.poll(0)

    def _transaction(self, chosen: Sequence[Message], commits: bool, partition: int = -1) -> None:
        self._number += 1
        producer = self._producer(**{"transactional.id": f"{self._settings.topic_prefix}{self._number}"})
        producer.init_transactions(60)
        producer.begin_transaction()
        into: dict[tuple[str, int, int], Message] = {}
        self._hand_over(producer, chosen, into, partition)
        assert producer.flush(60) == 0
        if commits:
            producer.commit_transaction(60)
            self._sent.at.update(into)
        else:
            producer.abort_transaction(60)
            self._sent.aborted += into.values()

    async def _raw(self) -> None:
        """Batches that no producer makes: a bomb among good records, header names that are not UTF-8."""
        self._number += 1
        before, after, named = (_price(f"R{self._number}{part}") for part in ("before", "after", "named"))
        odd = batches.record(0, named, b"R", [(b"\xff\xfe", b"x")])
        for topic in (*_INPUTS, *_INTERNAL, topics.DEAD_LETTERS):
            good = topic == topics.PRICES
            size = _LARGEST_BOMB if good else _BOMB
            for data, values in (
                (batches.bomb(size, before, after), [(before, good), (b" ", False), (after, good)]),
                (batches.batch(odd, 1), [(named, good)]),
            ):
                first = await batches.send(self._settings.bootstrap_servers, self._settings.topic(topic), 0, data)
                for offset, (value, is_good) in enumerate(values, first):
                    self._sent.at[topic, 0, offset] = Message(topic, b"R", value, good=is_good, kind="raw")

    # -- judging ---------------------------------------------------------------------------------------------------

    async def _at_the_end(self) -> bool:
        return not await self.behind()

    async def behind(self) -> dict[str, int]:
        """By role and partition, the records between its offset and the log's end, markers included."""
        stored = await self._topology.pool.fetch(
            "select consumer_group, topic, partition, next_offset from kafka_offsets"
        )
        held = {(row[0], TopicPartition(row[1], row[2])): row[3] for row in stored}
        admin = AIOKafkaAdminClient(bootstrap_servers=self._settings.bootstrap_servers)
        consumer = AIOKafkaConsumer(bootstrap_servers=self._settings.bootstrap_servers)
        await admin.start()
        await consumer.start()
        try:
            found = {}
            for group, names in topics_by_group(self._settings).items():
                places = [
                    TopicPartition(name, partition) for name in names for partition in range(self._partitions[name])
                ]
                ends = await consumer.end_offsets(places)
                if group not in {self._settings.group(role) for role in OWNED_BY_POSTGRES}:
                    committed = await admin.list_consumer_group_offsets(group)
                    held |= {(group, place): offset.offset for place, offset in committed.items()}
                for place, end in ends.items():
                    if left := end - held.get((group, place), 0):
                        found[f"{group} {place.topic}[{place.partition}]"] = left
            return found
        finally:
            await consumer.stop()
            await admin.close()

    async def _nothing_left(self) -> bool:
        row = await self._topology.pool.fetchrow(
            """
            select (select count(*) from dirty_keys) + (select count(*) from corrections where right_at is null)
                 + (select count(*) from reprocessing_jobs where status in ('PENDING', 'PROCESSING'))
                 + (select count(*) from outbox_events) as waiting
            """
        )
        return row["waiting"] == 0

    async def check(self) -> str:
        """Every good record applied, every bad one accounted for, the books right. Returns what was seen."""
        seen = await self._check_inputs()
        skipped = await self._check_internal()
        result = await self._topology.audit()
        assert not result.differences, result.differences[:3]
        assert self._topology.stack.restarts == 0
        connection = await connect(self._settings.dsn)
        try:
            assert all(lag.lag == 0 for lag in await read_lag(self._settings, connection))
        finally:
            await connection.close()
        memory = {role: _peak(worker.pid) for role, worker in self._topology.stack.workers.items()}
        assert max(memory.values()) < _MOST_MEMORY, memory
        return (
            f"{len(self._sent.at)} records: {dict(seen)}, skipped {skipped}, {len(self._sent.aborted)} aborted, "
            f"memory at most {memory} MiB"
        )

    async def _check_inputs(self) -> Counter[str]:
        letters = await self._letters()
        pool = self._topology.pool
        stored = {
            topics.BUSINESS_DATES: {row[0] for row in await pool.fetch("select business_date from business_dates")},
            topics.PRICES: {
                tuple(row): row for row in await pool.fetch("select security_id, price_date from market_prices")
            },
            topics.TRANSACTIONS: {row[0] for row in await pool.fetch("select transaction_id from transactions")},
        }
        seen: Counter[str] = Counter()
        lost = []
        for place, message in self._sent.of(_INPUTS):
            reason = letters.pop(place, None)
            try:
                decoded = _INPUTS[message.topic](message.value)
                applied = _identity(decoded) in stored[message.topic]
            except Rejected:
                applied = False
            if (message.good and not applied) or (not message.good and not applied and reason is None):
                lost.append((place, message.kind, reason, (message.value or b"")[:100]))
            seen["good" if message.good else reason or "accepted"] += 1
        for message in self._sent.aborted:
            if message.good and message.topic == topics.TRANSACTIONS:
                assert json.loads(message.value or b"")["transaction_id"] not in stored[message.topic]
        assert not lost, f"{len(lost)} of {len(self._sent.at)}: {lost[:5]}"
        assert not letters, f"letters about nothing that was sent: {list(letters.items())[:5]}"
        return seen

    async def _letters(self) -> dict[tuple[str, int, int], str]:
        """Reason by the place where a record was refused, of those letters that the engine has written."""
        found, _ = await read_all(self._settings, topics.DEAD_LETTERS)
        letters = {}
        for record in found:
            headers = {name: (value or b"").decode(errors="replace") for name, value in record.headers}
            if (
                "event_id" in headers
                and headers.get("offset", "").isdigit()
                and headers.get("topic", "x") in self._names()
            ):
                topic = headers["topic"].removeprefix(self._settings.topic_prefix)
                letters[topic, int(headers["partition"]), int(headers["offset"])] = headers["reason"]
        return letters

    def _names(self) -> set[str]:
        return {self._settings.topic(name) for name in _INPUTS}

    async def _check_internal(self) -> dict[str, int]:
        """What cannot be a record of ours is counted as skipped; a number may have been drawn meanwhile, or not yet."""
        highest = await self._topology.pool.fetchval("select last_value from correction_seq")
        least, most = Counter[str](), Counter[str]()
        for (topic, *_), message in self._sent.of(_INTERNAL):
            if topic == topics.JOBS and message.value is None:
                continue
            try:
                decoded = _INTERNAL[topic](message.value)
            except Rejected:
                least[topic] += 1
                continue
            numbers = [getattr(decoded, name) for name in ("seq", "job_id") if hasattr(decoded, name)]
            if decoded.security_id.encode() != message.key or max(numbers) > highest:
                least[topic] += 1
            else:
                most[topic] += 1
        counted: Counter[str] = Counter()
        for role in ("triggers", "resets"):
            for name, value in (await exported(self._topology.stack, role)).items():
                if name.startswith("internal_records_skipped_total"):
                    for topic in _INTERNAL:
                        counted[topic] += int(value) * (f'topic="{self._settings.topic(topic)}"' in name)
        for topic in _INTERNAL:
            assert least[topic] <= counted[topic], (topic, least, most, counted)
            if topic != topics.JOBS:  # a trigger that nobody has issued makes a job, which is refused in its turn
                assert counted[topic] <= least[topic] + most[topic], (topic, least, most, counted)
        return dict(counted)


def _peak(pid: int | None) -> int:
    """The most memory that the process has had, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def _identity(decoded: Any) -> Any:
    if isinstance(decoded, date):
        return decoded
    return getattr(decoded, "transaction_id", None) or (decoded.security_id, decoded.price_date)


def _price(security: str) -> bytes:
    return json.dumps({"security_id": security, "price_date": "2025-01-02", "price": 1}).encode()


def _last(topic: str) -> Message:
    """A record that changes nothing any more."""
    values: dict[str, Any] = {
        topics.BUSINESS_DATES: {"business_date": "2025-01-01"},
        topics.PRICES: {"security_id": "LAST", "price_date": "2025-01-02", "price": 1},
        topics.TRANSACTIONS: {
            "transaction_id": "LAST", "portfolio_id": "LAST", "security_id": "LAST", "transaction_date": "2025-01-02",
            "transaction_type": "BUY", "quantity": 1, "price": 1,
        },
    }  # fmt: skip
    good = topic in values
    return Message(topic, b"LAST", json.dumps(values.get(topic, {})).encode(), good=good, kind="last")


def garbage_rows(random: Random, count: int) -> list[tuple[bytes | None, bytes | None]]:
    """Records for the table's changelog that are no rows of it, or rows with numbers that were never drawn."""
    row = msgspec.json.encode(Entry())
    forged = {"in_flight": {
        "job_id": 2**62, "security_id": "G0", "earliest_impacted_date": "1900-01-01", "seq": 2**62,
        "created_at": datetime.now(UTC).isoformat(),
    }}  # fmt: skip
    choices: list[tuple[bytes | None, bytes | None]] = [
        (None, None), (None, row), (b"\xff\xfe", row), (b"", row), (b"G1", b"\xff"), (b"G2", b"[]"), (b"G3", b""),
        (b"G0", json.dumps(forged).encode()), (b"\0", None),
    ]  # fmt: skip
    return [random.choice(choices) for _ in range(count)] + choices
