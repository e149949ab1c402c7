"""The records that the roles send one another: decoded in one place, and whatever is no such record is skipped.

The topics are ours, yet anybody with the right to write may write to them. What is skipped is counted by topic and
kind, and logged once for each; nothing is lost by it, since the ledger of corrections triggers again what is not done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Literal, Protocol, TypeVar, get_args

import msgspec

from sinks.database import is_transient
from sinks.model import Job
from streams import metrics
from streams.records import Rejected, total
from tables.triggers import Entry, Status, Trigger

logger = logging.getLogger(__name__)

Kind = Literal["key", "malformed", "invalid", "too_large", "number"]
"""Why a record is skipped. key: it is not that of the security; number: the ledger does not know it."""
KINDS: tuple[Kind, ...] = get_args(Kind)

_ASK_SECONDS = 5.0

T = TypeVar("T", Trigger, Status, Job)


class Record(Protocol):
    """As much of a Kafka record as is looked at."""

    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...


decode_trigger = total(msgspec.json.Decoder(Trigger).decode)
decode_status = total(msgspec.json.Decoder(Status).decode)
decode_job = total(msgspec.json.Decoder(Job).decode)
_decode_entry = total(msgspec.json.Decoder(Entry).decode)


class Skipped:
    """What a worker has skipped of one topic."""

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self._said: set[Kind] = set()
        for kind in KINDS:
            metrics.INTERNAL_SKIPPED.labels(topic, kind)

    def count(self, kind: Kind, detail: str) -> None:
        """One record more; the first of its kind is logged."""
        metrics.INTERNAL_SKIPPED.labels(self.topic, kind).inc()
        if kind not in self._said:
            self._said.add(kind)
            logger.error("%s: a record was skipped, further ones are counted only: %s: %s", self.topic, kind, detail)

    def read(self, decode: Callable[[bytes | None], T], record: Record) -> T | None:
        """The record; None where it is none, which is counted."""
        try:
            found = decode(record.value)
        except Rejected as error:
            self.count(error.reason, error.detail)
            return None
        if record.key != found.security_id.encode():
            self.count("key", f"{record.key!r} is not the key of {found.security_id}")
            return None
        return found

    def entry(self, value: bytes | None) -> Entry | None:
        """A row of the table; an unreadable one counts as empty, and is written anew with the next trigger."""
        if value is None:
            return None
        try:
            return _decode_entry(value)
        except Rejected as error:
            self.count(error.reason, error.detail)
            return Entry()

    def holds(self, key: bytes | None, value: bytes | None) -> bool:
        """Whether a record of the table's changelog can be a row of it."""
        try:
            text = (key or b"").decode()
        except UnicodeDecodeError:
            text = ""
        if not text:
            self.count("key", f"{key!r} is no security")
            return False
        try:
            if value is not None:
                _decode_entry(value)
        except Rejected as error:
            self.count(error.reason, error.detail)
            return False
        return True


class Drawn:
    """Which numbers the ledger has drawn: a higher one is forged, or from a future that was lost with a restore.

    Such a number would cover corrections that are yet to come.
    """

    def __init__(self, ask: Callable[[], Awaitable[int]]) -> None:
        self._ask = ask
        self._highest = 0

    async def holds(self, number: int) -> bool:
        """Asks Postgres only about a number above all that it has named before.

        Where Postgres does not answer, the number is believed: what is lost by a wrong one is triggered again.
        """
        if number > self._highest:
            try:
                async with asyncio.timeout(_ASK_SECONDS):
                    self._highest = await self._ask()
            except Exception as error:
                if not is_transient(error):
                    raise
                logger.warning("number %d: %s: %s; believed", number, type(error).__name__, error)
                return True
        return number <= self._highest
