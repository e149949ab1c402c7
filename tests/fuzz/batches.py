"""Record batches byte by byte, as no producer would make them; and sending them as they are."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator

import cramjam
import lz4.frame
from aiokafka.conn import create_conn
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.util import calc_crc32c
from backports import zstd

from streams.codecs import GZIP, LZ4, SNAPPY, ZSTD


def compressed(codec: int, data: bytes) -> bytes:
    if codec == GZIP:
        return zlib.compress(data, wbits=31)
    if codec == SNAPPY:
        return bytes(cramjam.snappy.compress_raw(data))
    if codec == LZ4:
        return lz4.frame.compress(data)
    return zstd.compress(data) if codec == ZSTD else data


def varint(number: int) -> bytes:
    left, found = number << 1 ^ number >> 63, bytearray()
    while left > 0x7F:
        found.append(left & 0x7F | 0x80)
        left >>= 7
    return bytes([*found, left])


def record(
    delta: int, value: bytes | None, key: bytes | None = b"K", headers: Iterable[tuple[bytes, bytes | None]] = ()
) -> bytes:
    def sized(part: bytes | None) -> bytes:
        return varint(-1) if part is None else varint(len(part)) + part

    headers = list(headers)
    body = b"\0" + varint(0) + varint(delta) + sized(key) + sized(value) + varint(len(headers))
    body += b"".join(varint(len(name)) + name + sized(held) for name, held in headers)
    return varint(len(body)) + body


def batch(
    contents: bytes, count: int, codec: int = 0, base: int = 0, last: int | None = None, raw: bool = False
) -> bytes:
    """As it lies in the log. raw: the contents are what is compressed already."""
    packed = contents if raw else compressed(codec, contents)
    last = count - 1 if last is None else last
    tail = struct.pack(">hiqqqhii", codec, last, 1000, 1000, -1, -1, -1, count) + packed
    head = struct.pack(">qiibI", base, len(tail) + 9, 0, 2, calc_crc32c(tail))
    return head + tail


def bomb(size: int, before: bytes, after: bytes) -> bytes:
    """A batch of three records; the middle one has so many blanks, of which a thousandth is sent."""
    blanks = b" " * 2**20
    head = b"\0" + varint(0) + varint(1) + varint(1) + b"B" + varint(size)
    packer = zlib.compressobj(wbits=31)

    def contents() -> Iterator[bytes]:
        yield record(0, before)
        yield varint(len(head) + size + 1) + head
        for _ in range(size // len(blanks)):
            yield blanks
        yield varint(0) + record(2, after)

    packed = b"".join([packer.compress(part) for part in contents()]) + packer.flush()
    return batch(packed, 3, GZIP, raw=True)


async def send(bootstrap: str, topic: str, partition: int, data: bytes) -> int:
    """The batch as it is; returns its first offset. A broker may refuse it: then an AssertionError has its code."""
    host, _, port = bootstrap.rpartition(":")
    connection = await create_conn(host, int(port), request_timeout_ms=60_000, max_idle_ms=None)
    try:
        request = ProduceRequest(
            transactional_id=None, required_acks=-1, timeout=60_000, topics=[(topic, [(partition, data)])]
        )
        answer = await connection.send(request)
    finally:
        connection.close()
    ((_, ((_, code, offset, *_),)),) = answer.topics
    assert code == 0, f"refused with {code}"
    return int(offset)
