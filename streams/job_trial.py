"""The job topic in trial: one job at a time, worked to its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sinks import resets
from sinks.batches import Batch
from sinks.database import Connection
from streams import topics
from streams.herd import Herd, Host, decode
from streams.internal import Skipped

_LARGEST_ID = 2**63 - 1


class JobSubject:
    """Jobs as `streams.trial` tries them."""

    def __init__(self, app: Host) -> None:
        self._app = app
        self._skipped = Skipped(app.settings.topic(topics.JOBS))

    async def attempt(self, batch: Batch, alive: Callable[[], None]) -> None:
        """Open the job and work it to its end, under the cluster-wide rate."""
        await Herd(self._app).work_off(batch, alive)

    async def vouch(self, batch: Batch) -> bool:
        """Open the job and take that back."""
        jobs, _ = decode(batch.records, self._skipped)
        if jobs:
            await self._app.offsets.rehearse(batch, lambda c: resets.open_jobs(c, jobs))
        return bool(jobs)

    async def condemn(self, connection: Connection, record: Any, detail: str) -> None:
        """Fail the job if it was opened, so that its corrections are held; else the ledger issues it again.

        The job is known by the record's header: its value is what may not be touched.
        """
        number = dict(record.headers).get("job_id", b"")
        if number.isdigit() and int(number) <= _LARGEST_ID:
            for job in await resets.read(connection, [int(number)]):
                if not job.ended:
                    await resets.fail(connection, job, f"poison: {detail}")
