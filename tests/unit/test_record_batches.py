"""What consumers make of fetched bytes: every record at its place, in bounded memory, nothing raised."""

from __future__ import annotations

import random
import sys
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
from aiokafka.consumer import fetcher
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.legacy_records import LegacyRecordBatchBuilder
from aiokafka.structs import TopicPartition

from streams import codecs, fetched, kafka_clients
from streams.codecs import GZIP, LZ4, SNAPPY, ZSTD
from streams.record_batches import HEADER_BYTES, LARGEST_WHOLE
from streams.records import LARGEST_RECORD, Refused
from streams.settings import SettingsError
from tests.fuzz.batches import batch, compressed, record

PLACE = TopicPartition("prices", 0)
ALL = [0, GZIP, SNAPPY, LZ4, ZSTD]
MIB = 1024 * 1024


def reading(data: bytes, at: int = 0) -> Any:
    """What the consumer would have of a fetch."""
    return fetcher.PartitionRecords(
        PLACE, fetcher.MemoryRecords(data), [], at, None, None, True, fetcher.READ_COMMITTED
    )


def read(data: bytes, at: int = 0) -> tuple[list[Any], int]:
    """The records, and where the position is afterwards."""
    found = reading(data, at)
    return [each for each in found if hasattr(each, "offset")], found.next_fetch_offset


def shown(records: Iterable[Any]) -> list[tuple[int, Any]]:
    return [(each.offset, each.value.reason if isinstance(each.value, Refused) else each.value) for each in records]


def test_this_is_what_consumers_read_with() -> None:
    assert kafka_clients  # importing it is what installs this
    assert fetcher.PartitionRecords is fetched._Records
    assert fetcher.FetchResult is fetched._Fetched


@pytest.mark.parametrize("codec", ALL)
def test_every_codec_is_read(codec: int) -> None:
    builder = DefaultRecordBatchBuilder(2, 0, False, -1, -1, -1, 10_000)
    for offset in range(3):
        builder.append(offset, 1000 + offset, b"k%d" % offset, b"v" * 300, [("name", b"held"), ("null", None)])
    plain = bytes(builder.build())
    records, position = read(batch(plain[HEADER_BYTES:], 3, codec, base=7))
    assert [(r.offset, r.key, r.value, r.headers) for r in records] == [
        (7 + n, b"k%d" % n, b"v" * 300, (("name", b"held"), ("null", None))) for n in range(3)
    ]
    assert [r.timestamp for r in records] == [1000, 1001, 1002]
    assert position == 10


def test_snappy_in_the_frames_of_java_is_read() -> None:
    from aiokafka.codec import snappy_encode

    data = record(0, b"a" * 100_000) + record(1, b"b")
    assert shown(read(batch(snappy_encode(data), 2, SNAPPY, raw=True))[0]) == [(0, b"a" * 100_000), (1, b"b")]


@pytest.mark.parametrize("codec", ALL)
def test_a_batch_longer_than_what_is_inflated_whole_is_read_record_by_record(codec: int) -> None:
    values = [bytes([n % 251]) * 50_000 for n in range(100)]
    data = b"".join(record(n, value) for n, value in enumerate(values))
    assert len(data) > 2 * LARGEST_WHOLE
    records, position = read(batch(data, 100, codec), at=3)
    assert shown(records) == list(enumerate(values))[3:]
    assert position == 100


@pytest.mark.parametrize("codec", [GZIP, SNAPPY, LZ4, ZSTD])
def test_a_record_that_is_too_large_is_refused_alone_and_its_neighbours_are_read(codec: int) -> None:
    size = 8 * MIB
    data = record(0, b"before") + record(1, b" " * size, key=b"large") + record(2, b"after")
    records, position = read(batch(data, 3, codec))
    assert shown(records) == [(0, b"before"), (1, "too_large"), (2, b"after")]
    large = records[1]
    assert large.key == b"large"
    assert str(size)[:4] in large.value.detail
    assert LARGEST_RECORD < len(large.value) <= LARGEST_RECORD + 1
    assert position == 3


@pytest.mark.parametrize("codec", [GZIP, LZ4, ZSTD])
def test_memory_does_not_grow_with_what_a_batch_inflates_to(codec: int) -> None:
    def peak(size: int) -> int:
        packed = batch(record(0, b" " * size) + record(1, b"after"), 2, codec)
        tracemalloc.start()
        assert shown(read(packed)[0]) == [(0, "too_large"), (1, b"after")]
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(24 * MIB) < peak(6 * MIB) + MIB


def test_others_have_their_turn_while_a_batch_is_long_in_inflating() -> None:
    found = list(reading(batch(record(0, b" " * 256 * MIB), 1, ZSTD)))
    assert len(found) - 1 >= 3


class _Assignment:
    active = True

    def __init__(self) -> None:
        self.position, self.paused = 0, False

    def state_value(self, _: Any) -> _Assignment:
        return self

    def consumed_to(self, offset: int) -> None:
        self.position = offset


def test_a_chunk_is_bounded_in_bytes_and_empty_while_a_batch_is_long_in_inflating() -> None:
    data = b"".join(record(n, b" " * (MIB - 1000)) for n in range(20)) + record(20, b" " * 72 * MIB) + record(21, b"x")
    result = fetcher.FetchResult(
        PLACE, assignment=_Assignment(), partition_records=reading(batch(data, 22, ZSTD)), backoff=0
    )
    chunks = []
    while result.has_more():
        chunks.append(result.getall(500))
    assert [r.offset for chunk in chunks for r in chunk] == list(range(22))
    assert max(sum(len(r.value) for r in chunk) for chunk in chunks) <= 2 * fetched.CHUNK_BYTES
    assert [] in chunks[:-1]


def test_one_record_after_another_passes_over_what_is_long_in_inflating() -> None:
    data = record(0, b" " * 72 * MIB) + record(1, b"x")
    result = fetcher.FetchResult(
        PLACE, assignment=_Assignment(), partition_records=reading(batch(data, 2, GZIP)), backoff=0
    )
    assert [result.getone().offset, result.getone().offset, result.getone()] == [0, 1, None]


def test_a_header_whose_name_is_no_utf8_does_not_refuse_its_record() -> None:
    data = record(0, b"a") + record(1, b"b", headers=[(b"\xff", b"x"), (b"ok", None)]) + record(2, b"c")
    records, _ = read(batch(data, 3))
    assert shown(records) == [(0, b"a"), (1, b"b"), (2, b"c")]
    assert records[1].headers == (("\ufffd", b"x"), ("ok", None))


def test_of_very_many_headers_only_some_are_kept() -> None:
    many = [(b"", None)] * 20_000
    for data in (batch(record(0, b"v", headers=many), 1), batch(record(0, b"v", headers=[(b"\xff", b""), *many]), 1)):
        (found,), _ = read(data)
        assert found.value == b"v"
        assert len(found.headers) == 100


def corrupt(data: bytes, place: int = -1) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 0xFF
    return bytes(changed)


def test_a_wrong_checksum_is_fetched_again_and_then_refused() -> None:
    data = corrupt(batch(record(0, b"a") + record(1, b"b"), 2)) + batch(record(0, b"good"), 1, base=2)
    fetched._doubtful.clear()
    assert read(data) == ([], 0)
    assert read(data) == ([], 0)
    records, position = read(data)
    assert shown(records) == [(1, "malformed"), (2, b"good")]
    assert "offsets 0 to 1" in records[0].value.detail
    assert position == 3


@pytest.mark.parametrize("codec", [GZIP, SNAPPY, LZ4, ZSTD, 5, 7])
@pytest.mark.parametrize("cut", ["half", "garbage", "nothing"])
def test_what_cannot_be_inflated_is_refused_and_the_next_batch_is_read(codec: int, cut: str) -> None:
    whole = compressed(codec, record(0, b"a" * 1000) + record(1, b"b"))
    packed = {"half": whole[: len(whole) // 2], "garbage": b"\x01\xfe" * 40, "nothing": b""}[cut]
    records, position = read(batch(packed, 2, codec, raw=True) + batch(record(0, b"good"), 1, base=2))
    assert shown(records)[-2:] == [(1, "malformed"), (2, b"good")]
    assert position == 3


def test_a_snappy_block_that_claims_gigabytes_takes_none() -> None:
    claim = b"\xff\xff\xff\xff\x0f" + b"\0" * 20
    tracemalloc.start()
    assert shown(read(batch(claim, 1, SNAPPY, raw=True))[0]) == [(0, "malformed")]
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


@pytest.mark.parametrize("magic", [3, 127])
def test_an_unknown_format_is_refused(magic: int) -> None:
    data = bytearray(batch(record(0, b"a"), 1))
    data[16] = magic
    records, position = read(bytes(data) + batch(record(0, b"good"), 1, base=1))
    assert shown(records) == [(0, "malformed"), (1, b"good")]
    assert position == 2


@pytest.mark.parametrize("codec", [0, GZIP, SNAPPY, LZ4])
def test_messages_from_before_kafka_0_11_are_read(codec: int) -> None:
    builder = LegacyRecordBatchBuilder(1, codec, 10_000)
    for offset in range(2):
        builder.append(offset, 1000, b"k", b"old%d" % offset)
    assert shown(read(bytes(builder.build()))[0]) == [(0, b"old0"), (1, b"old1")]
    builder = LegacyRecordBatchBuilder(1, codec or GZIP, 40 * MIB)
    builder.append(0, 1000, b"k", b" " * 18 * MIB)
    assert shown(read(bytes(builder.build()))[0]) == [(0, "malformed")]


def test_whatever_the_bytes_are_the_position_moves_and_good_batches_are_read() -> None:
    chance = random.Random(11)
    good = batch(record(0, b"good"), 1, base=10)
    for _ in range(1_500):
        codec = chance.choice(ALL)
        contents = bytearray(b"".join(record(n, chance.randbytes(30), headers=[(b"h", b"x")]) for n in range(5)))
        for _ in range(chance.choice([1, 1, 2, 5])):
            contents[chance.randrange(len(contents))] = chance.randrange(256)
        packed = bytearray(compressed(codec, bytes(contents)))
        if chance.random() < 0.5:
            packed[chance.randrange(len(packed))] ^= 1 << chance.randrange(8)
        records, position = read(
            batch(bytes(packed), chance.choice([5, 5, 4, 6, 2**31 - 1, -1]), codec, raw=True, last=4) + good
        )
        assert position == 11
        assert records[-1].value == b"good"
        offsets = [each.offset for each in records]
        assert offsets == sorted(set(offsets))
        assert offsets[-1] == 10
        assert all(offset < 5 for offset in offsets[:-1])


def test_every_codec_works_here() -> None:
    codecs.check()


@pytest.mark.parametrize("codec", [GZIP, SNAPPY, LZ4, ZSTD])
def test_a_codec_that_does_not_work_is_named_in_one_line(codec: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("cramjam", "lz4.frame", "backports"):
        monkeypatch.setitem(sys.modules, package, None)
    if codec == GZIP:
        monkeypatch.delitem(codecs._STREAMED, GZIP)
    monkeypatch.setattr(codecs, "_SAMPLES", {codec: codecs._SAMPLES[codec]})
    with pytest.raises(SettingsError, match=codecs.NAMES[codec] if codec != GZIP else "codec 1"):
        codecs.check()


def test_a_codec_that_inflates_to_something_else_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "inflate", lambda codec, data: iter([b"something else"]))
    with pytest.raises(SettingsError, match="records compressed with gzip are not read right"):
        codecs.check()
