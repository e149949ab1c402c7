"""Requests as bytes, for what no well-behaved client sends."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """status 0: the connection was closed without one."""

    status: int
    headers: dict[str, str]
    body: bytes


async def send(
    url: str, method: str, path: bytes | str, headers: dict[str, bytes | str] | None = None, body: bytes | str = b""
) -> Answer:
    """One request on a connection of its own."""
    place = urlsplit(url)
    payload = _bytes(body)
    fields = {"Host": place.netloc, "Connection": "close", **(headers or {})}
    if payload:
        fields.setdefault("Content-Length", str(len(payload)))
    head = b"".join(name.encode() + b": " + _bytes(value) + b"\r\n" for name, value in fields.items())
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        try:
            writer.write(method.encode() + b" " + _bytes(path) + b" HTTP/1.1\r\n" + head + b"\r\n" + payload)
            raw = await reader.read()
        except ConnectionError:
            raw = b""
        finally:
            writer.close()
    start, _, rest = raw.partition(b"\r\n\r\n")
    first, *lines = start.decode("latin-1").split("\r\n")
    found = dict(line.split(": ", 1) for line in lines if ": " in line)
    return Answer(int(first.split()[1]) if first else 0, {name.lower(): value for name, value in found.items()}, rest)


def _bytes(text: bytes | str) -> bytes:
    return text if isinstance(text, bytes) else text.encode()
