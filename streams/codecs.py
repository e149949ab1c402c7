"""Inflating compressed record batches piece by piece, so that memory is bounded whatever they inflate to."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from streams.settings import SettingsError

GZIP, SNAPPY, LZ4, ZSTD = 1, 2, 3, 4
NAMES = {GZIP: "gzip", SNAPPY: "snappy", LZ4: "lz4", ZSTD: "zstd"}
"""By the number that a record batch names its codec with."""

PIECE = 256 * 1024
"""Bytes that are inflated at once, except for snappy."""

_SAMPLE = b"tidemark" * 4
_SAMPLES = {
    GZIP: "1f8b08000000000000032bc94c49cd4d2cca2ec141030026e2e19c20000000",
    SNAPPY: "201c746964656d61726b5e0800",
    LZ4: "04224d186840200000000000000030120000008f746964656d61726b08000050656d61726b00000000",
    ZSTD: "28b52ffd202075000040746964656d61726b0100030b17",
}
_XERIAL = b"\x82SNAPPY\x00"
_XERIAL_HEADER = 16
_SNAPPY_GROWTH = 22  # Snappy cannot say more than 64 bytes with 3.


class Corrupt(Exception):  # noqa: N818 - an outcome
    """What is compressed cannot be inflated to its end; the message says why."""


def check() -> None:
    """Inflate a sample with every codec. Raises SettingsError, one line that names the one that does not work."""
    for codec, sample in _SAMPLES.items():
        try:
            works = b"".join(inflate(codec, bytes.fromhex(sample))) == _SAMPLE
        except Corrupt as error:
            raise SettingsError(f"records compressed with {error}: install Tidemark's requirements anew") from None
        if not works:
            raise SettingsError(f"records compressed with {NAMES[codec]} are not read right: install Tidemark anew")


def inflate(codec: int, data: bytes | memoryview) -> Iterator[bytes]:
    """The contents, piece after piece. Raises Corrupt, also for a codec that Kafka does not know."""
    try:
        yield from _pieces(codec, data)
    except Corrupt:
        raise
    except Exception as error:  # each codec has errors of its own
        raise Corrupt(f"{NAMES.get(codec, codec)}: {error or type(error).__name__}") from error


def _pieces(codec: int, data: bytes | memoryview) -> Iterator[bytes]:
    if codec == SNAPPY:
        return _snappy(bytes(data))
    new = _STREAMED.get(codec)
    if new is None:
        raise Corrupt(f"unknown compression codec {codec}")
    return _streamed(new, bytes(data))


def _streamed(new: Callable[[], Any], data: bytes) -> Iterator[bytes]:
    """For decompressors that take a bound for what they give; the data may be several streams in a row."""
    while data:
        decompressor = new()
        piece = decompressor.decompress(data, PIECE)
        while True:
            if piece:
                yield piece
            elif not decompressor.eof:
                raise Corrupt("the compressed data end too early")
            if decompressor.eof:
                break
            piece = decompressor.decompress(b"", PIECE)
        data = decompressor.unused_data or b""


class _Gzip:
    """zlib's decompressor with the interface of the others, which keep what they have not used yet."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    def decompress(self, data: bytes, most: int) -> bytes:
        return self._zlib.decompress(data or self._zlib.unconsumed_tail, most)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data


def _snappy(data: bytes) -> Iterator[bytes]:
    """One block, or the framed blocks of Java's library. A block is inflated whole: it cannot grow by much."""
    if not data.startswith(_XERIAL):
        yield _block(data)
        return
    place = _XERIAL_HEADER
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big", signed=True)
        place += 4
        if not 0 < size <= len(data) - place:
            raise Corrupt("the compressed data end too early")
        yield _block(data[place : place + size])
        place += size


def _block(data: bytes) -> bytes:
    import cramjam

    claimed = cramjam.snappy.decompress_raw_len(data)
    if claimed > _SNAPPY_GROWTH * len(data):
        raise Corrupt(f"snappy: {len(data)} bytes claim to be {claimed}")
    return bytes(cramjam.snappy.decompress_raw(data))


def _lz4() -> Any:
    import lz4.frame

    return lz4.frame.LZ4FrameDecompressor()


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd.ZstdDecompressor()


_STREAMED: dict[int, Callable[[], Any]] = {GZIP: _Gzip, LZ4: _lz4, ZSTD: _zstd}
