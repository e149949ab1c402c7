"""The background auditor: piece after piece of the books for ever, within a share of one processor's time.

A process of its own, `python -m tidemark.audit.background`, started by the `books` role (streams/auditor.py). It reads
settings from the environment, writes one JSON line per piece that differs to stdout, and ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict

from sinks.audit_progress import Progress, leadership
from sinks.audit_reader import Piece, open_books
from sinks.database import DatabaseError, is_transient
from streams.settings import load
from tidemark.audit.books import piece_size
from tidemark.audit.piece import audit_piece
from tidemark.oracle import Difference, Method

_STANDBY_SECONDS = 10.0
_PAUSE_SECONDS = 2.0  # after a pass or an error; small books need no more than that
_LONGEST_REST = 60.0
_REMEMBERED = 100_000


class Auditor:
    """Sweeps the keys in order, each piece at a moment of its own; reports a difference once."""

    def __init__(
        self,
        dsn: str,
        method: Method,
        share: float,
        report: Callable[[Difference], None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._dsn = dsn
        self._method = method
        self._share = share
        self._report = report
        self._sleep = sleep
        self._reported: set[Difference] = set()

    async def run(self) -> None:
        """For ever; database errors that pass are waited out."""
        while True:
            try:
                async with leadership(self._dsn) as progress:
                    while progress:
                        await self.step(progress)
            except Exception as error:
                if not (is_transient(error) or isinstance(error, DatabaseError)):
                    raise
            await self._sleep(_STANDBY_SECONDS)

    async def step(self, progress: Progress) -> bool:
        """Audit the next piece, then rest; returns whether that ended a pass."""
        started = time.monotonic()
        rest = Piece(after=await progress.cursor())
        async with open_books(self._dsn) as reader:
            piece = await reader.head(rest, await piece_size(reader))
            findings = await audit_piece(reader, self._method, piece)
        for difference in findings.differences:
            self._tell(difference)
        await progress.advance(piece.upto, findings.keys, len(findings.differences))
        is_last = piece.upto == rest.upto
        if is_last:
            await progress.finish()
        worked = time.monotonic() - started
        pause = min(_LONGEST_REST, worked * (1 - self._share) / self._share)
        await self._sleep(max(pause, _PAUSE_SECONDS if is_last else 0))
        return is_last

    def _tell(self, difference: Difference) -> None:
        if difference in self._reported:
            return
        if len(self._reported) >= _REMEMBERED:
            self._reported.clear()
        self._reported.add(difference)
        self._report(difference)


async def _main() -> None:
    settings = load()
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    auditor = Auditor(settings.dsn, settings.cost_basis_method, settings.audit_share, _print)
    auditing = asyncio.create_task(auditor.run())
    orphaned = asyncio.create_task(reader.read())
    await asyncio.wait({auditing, orphaned}, return_when=asyncio.FIRST_COMPLETED)
    if auditing.done():
        auditing.result()


def _print(difference: Difference) -> None:
    sys.stdout.write(json.dumps({"line": str(difference), **asdict(difference)}, default=str) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    os.nice(10)
    asyncio.run(_main())
