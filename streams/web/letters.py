"""The dead letters: read from their topic by a consumer of its own, and sent again after repair.

Anyone may write to the topic, so everything about a letter may be missing or odd: it is shown as what it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sinks.ranges import ID, OutOfRange
from sinks.resubmission import Resubmission, resubmit, resubmitted
from streams import records, topics
from streams.app import App
from streams.records import Rejected
from streams.web.backwards import Topic
from streams.web.problems import Problem, unavailable

UNKNOWN = "unknown"
_CURSOR = re.compile(r"[0-9]{1,19}(-[0-9]{1,19}){0,1023}", re.ASCII)
_LISTED = 2_000  # characters of a text in a list; one letter alone is shown whole
_DECODERS: Mapping[str, Callable[[bytes | None], Any]] = {
    topics.BUSINESS_DATES: records.decode_business_date,
    topics.PRICES: records.decode_price,
    topics.TRANSACTIONS: records.decode_transaction,
}


@dataclass(frozen=True, slots=True)
class Letter:
    """A refused record. partition, offset: its place in dead-letters; source_…: where it was refused.

    value: as text, undecodable bytes as \\xNN; None: a tombstone. truncated: its length where it was cut when it was
    refused. shortened: whether texts are cut for a list. What a header does not say is None, the reason `unknown`.
    """

    partition: int
    offset: int
    refused_at: datetime | None
    reason: str
    detail: str
    topic: str
    source_partition: int | None
    source_offset: int | None
    key: str | None
    value: str | None
    is_text: bool
    truncated: int | None
    shortened: bool
    resubmitted_by: str | None

    @property
    def place(self) -> str:
        """partition:offset."""
        return f"{self.partition}:{self.offset}"


class Letters:
    """Reads the letters at every call, a page at a time: they are few, and the topic is the only truth."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._prefix = app.settings.topic_prefix
        self._topic = Topic(app.settings, app.settings.topic(topics.DEAD_LETTERS))

    async def page(self, limit: int, reason: str | None, cursor: str) -> tuple[list[Letter], str | None]:
        """(newest first, where the next page begins or None). A page of large letters has fewer than the limit."""
        below = _positions(cursor)
        found: list[Letter] = []
        async with self._topic.reader() as reader:
            newest_first = await reader.backwards(below, lambda record: _shortened(self._letter(record)))
            async for letter in newest_first:
                if reason in (None, letter.reason):
                    found.append(letter)
                    if len(found) == limit:
                        break
            rest = newest_first.cursor
            if newest_first.late and not found:
                raise unavailable("the broker did not give the dead letters in time")
        sent = await self._resubmitted()
        following = None if rest is None else "-".join(map(str, rest))
        return [replace(letter, resubmitted_by=sent.get(letter.place)) for letter in found], following

    async def one(self, partition: int, offset: int) -> Letter:
        """Whole. Raises Problem `not-found`."""
        letter = self._letter(await self._fetch(partition, offset))
        return replace(letter, resubmitted_by=(await self._resubmitted()).get(letter.place))

    async def resubmit(self, actor: str, partition: int, offset: int, value: str | None) -> None:
        """Send the record again; with another value, which must at least be readable. Raises Problem."""
        raw = await self._fetch(partition, offset)
        letter = self._letter(raw)
        if value is None and letter.truncated is not None:
            raise Problem("refused", "the record was cut when it was refused: give its whole value")
        again = raw.value if value is None else value.encode()
        decode = _DECODERS.get(letter.topic)
        if decode is None or again is None:
            raise Problem("refused", f"records of {letter.topic or UNKNOWN} without a value are not sent again")
        if letter.reason != "poison":  # what has killed workers is not tried in this one
            try:
                decode(again)
            except Rejected as error:
                raise Problem("refused", f"it would be refused again: {error}") from None
        record = Resubmission(letter.topic, raw.key, again, partition, offset)
        async with (await self._app.pool()).acquire() as connection:
            await resubmit(connection, actor, record)
        self._app.outbox_written()

    async def _fetch(self, partition: int, offset: int) -> Any:
        async with self._topic.reader() as reader:
            found = await reader.one(partition, offset)
        if found is None:
            raise Problem("not-found", f"there is no dead letter {partition}:{offset} (any more)")
        return found

    async def _resubmitted(self) -> dict[str, str]:
        async with (await self._app.pool()).acquire() as connection:
            return await resubmitted(connection)

    def _letter(self, record: Any) -> Letter:
        headers = {name: (value or b"").decode(errors="replace") for name, value in record.headers}
        value, is_text = _text(record.value)
        return Letter(
            partition=record.partition,
            offset=record.offset,
            refused_at=_moment(record.timestamp),
            reason=headers.get("reason") or UNKNOWN,
            detail=headers.get("detail", ""),
            topic=headers.get("topic", "").removeprefix(self._prefix),
            source_partition=_whole(headers.get("partition", "")),
            source_offset=_whole(headers.get("offset", "")),
            key=_text(record.key)[0],
            value=value,
            is_text=is_text,
            truncated=_whole(headers.get("truncated", "")),
            shortened=False,
            resubmitted_by=None,
        )


def _positions(cursor: str) -> list[int] | None:
    if not cursor:
        return None
    try:
        if _CURSOR.fullmatch(cursor):
            return [ID.parse(each) for each in cursor.split("-")]
    except OutOfRange:
        pass
    raise Problem("invalid", "cursor: take it from the Link header of the page before")


def _shortened(letter: Letter) -> Letter:
    texts = {name: getattr(letter, name) for name in ("reason", "detail", "topic", "key", "value")}
    long = {name: text[:_LISTED] for name, text in texts.items() if text and len(text) > _LISTED}
    return replace(letter, shortened=True, **long) if long else letter


def _whole(text: str) -> int | None:
    try:
        return ID.parse(text)
    except OutOfRange:
        return None


def _moment(milliseconds: int) -> datetime | None:
    """None where the producer gave no time, or one that no calendar has."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds >= 0 else None
    except (ValueError, OverflowError, OSError):
        return None


def _text(raw: bytes | None) -> tuple[str | None, bool]:
    if raw is None:
        return None, False
    try:
        return raw.decode(), True
    except UnicodeDecodeError:
        return raw.decode(errors="backslashreplace"), False
