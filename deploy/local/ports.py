"""TCP ports on the loopback: free ones, and the same ones again at the next start."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

LOOPBACK = "127.0.0.1"
_ATTEMPTS = 50


class Ports:
    """The ports of one stack by purpose, remembered in a file so that addresses stay the same between runs."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known = _read(file)

    def choose(self, purpose: str, preferred: int | None = None) -> int:
        """A port that is free now: `preferred`, else the remembered one, else any."""
        taken = {port for name, port in self._known.items() if name != purpose}
        for port in (preferred, self._known.get(purpose)):
            if port and port not in taken and is_free(port):
                return self._remember(purpose, port)
        return self._remember(purpose, _any_port(taken))

    def _remember(self, purpose: str, port: int) -> int:
        if self._known.get(purpose) != port:
            self._known[purpose] = port
            self._file.write_text(json.dumps(self._known, indent=1) + "\n")
        return port


def is_free(port: int) -> bool:
    """Whether a server could listen on the port now (connections in TIME_WAIT do not matter to servers)."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


async def answers(host: str, port: int, timeout: float = 2.0) -> bool:
    """Whether something accepts TCP connections there."""
    try:
        async with asyncio.timeout(timeout):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


async def http_status(host: str, port: int, path: str, token: str | None = None, timeout: float = 3.0) -> int | None:
    """The status of an HTTP GET, or None when there is no answer."""
    try:
        async with asyncio.timeout(timeout):  # not wait_for, which may swallow a cancellation
            return await _http_status(host, port, path, token)
    except (OSError, TimeoutError, ValueError, IndexError, asyncio.IncompleteReadError):
        return None


async def _http_status(host: str, port: int, path: str, token: str | None) -> int:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        bearer = f"Authorization: Bearer {token}\r\n" if token else ""
        request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n{bearer}Connection: close\r\n\r\n"
        writer.write(request.encode("ascii"))
        await writer.drain()
        return int((await reader.readline()).split()[1])
    finally:
        writer.close()


def _any_port(taken: set[int]) -> int:
    for _ in range(_ATTEMPTS):
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port: int = probe.getsockname()[1]
        if port not in taken:
            return port
    raise OSError("no free port on the loopback")


def _read(file: Path) -> dict[str, int]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(name): port for name, port in found.items() if isinstance(port, int)}
