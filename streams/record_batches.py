"""One record batch, from the bytes of the log to its records: in bounded memory, and whatever the bytes are.

aiokafka's fast parser does the work. `_walk` does where a batch is too large to be inflated whole, or where that parser
gives up. A record that is too large, or cannot be read, has the value `Refused`.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

from aiokafka.record.default_records import DefaultRecordBatch
from aiokafka.record.util import decode_varint

from streams.codecs import Corrupt, inflate
from streams.records import LARGEST_RECORD, Refused, too_large

logger = logging.getLogger(__name__)

LARGEST_WHOLE = 2 * LARGEST_RECORD
"""Bytes that a batch is inflated to before its records are looked at one by one: as a topic's max.message.bytes."""
MOST_HEADERS = 100
CODEC = 0x07
"""The bits of a batch's attributes that name its codec."""

_HEADER = struct.Struct(">qiibIhiqqqhii")
HEADER_BYTES = _HEADER.size
_LOG_APPEND_TIME = 0x08
_AT_A_STRETCH = 64 * 1024 * 1024  # bytes that are inflated before others have their turn
_LONGEST_VARINT = 10


class Breath:
    """In place of a record: let others have their turn."""


BREATH = Breath()


class _Header(NamedTuple):
    """Of a record batch, as it lies in the log."""

    base_offset: int
    length: int
    leader_epoch: int
    magic: int
    checksum: int
    attributes: int
    last_offset_delta: int
    first_timestamp: int
    max_timestamp: int
    producer_id: int
    producer_epoch: int
    base_sequence: int
    records: int


class Record(NamedTuple):
    """A record that aiokafka's parser has not read, with what it would say of it."""

    offset: int
    timestamp: int
    timestamp_type: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    checksum: None = None


def read(raw: memoryview) -> Iterator[Any]:
    """The records of a batch, with breaths between them. Raises Corrupt."""
    header, contents = _Header._make(_HEADER.unpack_from(raw)), raw[HEADER_BYTES:]
    codec = header.attributes & CODEC
    if codec == 0:
        yield from _parsed(header, bytes(raw), [contents])
        return
    pieces = inflate(codec, contents)
    begun: list[bytes | memoryview] = []
    size = 0
    for piece in pieces:
        begun.append(piece)
        size += len(piece)
        if size > LARGEST_WHOLE:
            yield from _walk(header, chain(begun, pieces))
            return
    plain = _HEADER.pack(*header._replace(attributes=header.attributes & ~CODEC))
    yield from _parsed(header, b"".join([plain, *begun]), begun)


def _parsed(header: _Header, plain: bytes, pieces: list[bytes | memoryview]) -> Iterator[Any]:
    """With aiokafka's parser. What it cannot read is read by ours: Kafka's broker lets pass more than it does."""
    last = header.base_offset - 1
    try:
        for record in DefaultRecordBatch(plain):
            last = record.offset
            yield record
        return
    except Exception as error:  # for one, a header whose name is not UTF-8
        logger.debug("read again record by record: %s", error)
    for record in _walk(header, iter(pieces)):
        if record is BREATH or record.offset > last:
            yield record


def _walk(header: _Header, pieces: Iterator[bytes | memoryview]) -> Iterator[Any]:
    """Record by record; of one that is too large only the beginning is kept. Raises Corrupt."""
    stream = _Stream(pieces)
    for _ in range(header.records):
        length = stream.varint()
        if length < 0:
            raise Corrupt(f"a record of {length} bytes")
        kept = stream.take(min(length, LARGEST_WHOLE))
        yield _parse(header, kept, length)
        left = length - len(kept)
        del kept
        while left:
            left -= stream.skip(left)
            if stream.is_long():
                yield BREATH
        if stream.is_long():
            yield BREATH


class _Stream:
    """Pieces of bytes, read one after another."""

    def __init__(self, pieces: Iterator[bytes | memoryview]) -> None:
        self._pieces = pieces
        self._bytes: bytes | bytearray | memoryview = b""
        self._place = 0
        self._since_breath = 0

    def is_long(self) -> bool:
        """Whether so much has been read since the last time that others should have their turn."""
        if self._since_breath < _AT_A_STRETCH:
            return False
        self._since_breath = 0
        return True

    def varint(self) -> int:
        """A number of variable length. Raises Corrupt."""
        for count in range(_LONGEST_VARINT):
            self._have(count + 1)
            if self._bytes[self._place + count] < 0x80:
                number, self._place = decode_varint(self._bytes, self._place)
                return int(number)
        raise Corrupt("a number that does not end")

    def take(self, count: int) -> bytes:
        """So many bytes. Raises Corrupt."""
        self._have(count)
        start, self._place = self._place, self._place + count
        return bytes(self._bytes[start : self._place])

    def skip(self, most: int) -> int:
        """Pass over some bytes; returns how many. Raises Corrupt."""
        self._have(1)
        passed = min(most, len(self._bytes) - self._place)
        self._place += passed
        return passed

    def _have(self, count: int) -> None:
        left = len(self._bytes) - self._place
        if left >= count:
            return
        waiting = [self._bytes[self._place :]]
        while left < count:
            piece = next(self._pieces, None)
            if piece is None:
                raise Corrupt("the record batch ends too early")
            waiting.append(piece)
            left += len(piece)
            self._since_breath += len(piece)
        self._bytes, self._place = b"".join(waiting), 0


def _parse(header: _Header, kept: bytes, length: int) -> Record:
    """One record of so many bytes, of which the first ones are given. Raises Corrupt where it has no offset."""
    try:
        delta, place = decode_varint(kept, 1)  # after its attributes, which mean nothing yet
        offset_delta, place = decode_varint(kept, place)
    except (IndexError, ValueError) as error:
        raise Corrupt(f"a record without an offset: {error}") from error
    at = header.base_offset + offset_delta
    append_time = bool(header.attributes & _LOG_APPEND_TIME)
    timestamp = header.max_timestamp if append_time else header.first_timestamp + delta
    key: bytes | None = None
    try:
        key, place = _bytes(kept, place, length)
        value, place = _bytes(kept, place, length)
        headers = _headers(kept, place) if length == len(kept) else []
    except (IndexError, ValueError) as error:
        if length > LARGEST_RECORD:
            value, headers = Refused(b"", "too_large", too_large(length)), []
        else:
            value, headers = Refused(kept, "malformed", f"the record cannot be read: {error}"), []
    if length > len(kept):
        value = Refused((value or b"")[: LARGEST_RECORD + 1], "too_large", too_large(length))
    return Record(at, timestamp, int(append_time), key and key[:LARGEST_RECORD], value, headers)


def _bytes(kept: bytes, place: int, length: int) -> tuple[bytes | None, int]:
    """Bytes behind their own length, as far as they are kept."""
    size, place = decode_varint(kept, place)
    if size < 0:
        return None, place
    if place + size > length:
        raise ValueError(f"{size} bytes in a record of {length}")
    return kept[place : place + size], place + size


def _headers(kept: bytes, place: int) -> list[tuple[str, bytes | None]]:
    """The first ones. A name that is not UTF-8 is made readable: nothing depends on it."""
    count, place = decode_varint(kept, place)
    found = []
    for _ in range(min(count, MOST_HEADERS)):
        name, place = _bytes(kept, place, len(kept))
        value, place = _bytes(kept, place, len(kept))
        found.append(((name or b"").decode(errors="replace"), value))
    return found
