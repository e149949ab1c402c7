"""Whatever bytes arrive on any topic: good records are applied, bad ones accounted for, and nobody stops."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from random import Random

from deploy.local.postgres import PostgresServer
from streams import topics
from tests.exported import exported
from tests.fuzz.mutations import Message
from tests.fuzz.run import Fuzz, garbage_rows
from tests.topology import run_topology, until

_SEED = int(os.environ.get("FUZZ_SEED", "1"))
_RECORDS = 5_000


async def test_whatever_arrives_every_role_makes_progress(kafka: str, postgres: PostgresServer, folder: Path) -> None:
    dsn = await postgres.create_database("fuzz")
    async with run_topology(kafka, dsn, folder, repair_after_seconds=3) as topology:
        fuzz = Fuzz(topology, _SEED)
        await fuzz.send(_RECORDS)
        assert fuzz.aborted
        await fuzz.finish()
        print(f"seed {_SEED}: {await fuzz.check()}")

        # The table's changelog is read at the start of a worker alone.
        worker = topology.stack.workers["triggers"]
        pid = worker.pid
        assert pid
        os.kill(pid, signal.SIGSTOP)
        shutil.rmtree(topology.settings.data_dir / "worker-triggers" / "tables-triggers")
        rows = garbage_rows(Random(_SEED), 200)
        fuzz._produce(
            [
                Message(topics.changelog(topology.settings).removeprefix(topology.settings.topic_prefix), *row)
                for row in rows
            ]
        )
        os.kill(pid, signal.SIGKILL)

        async def again() -> bool:
            return worker.restarts == 1 and worker.ready

        await until(again, "the triggers worker with garbage in its changelog")
        worker.restarts = 0
        skipped = {n: v for n, v in (await exported(topology.stack, "triggers")).items() if "changelog" in n and v}
        assert any('kind="key"' in name for name in skipped), skipped
        late = {"security_id": "G0", "price_date": "2025-01-03", "price": "77", "revision": 2**40}
        await topology.send([("prices", {**late, "security_id": f"G{n}"}) for n in range(5)])
        await fuzz.finish()
        result = await topology.audit()
        assert not result.differences, result.differences[:3]


async def test_offsets_move_over_the_markers_at_the_end_of_a_log(
    kafka: str, postgres: PostgresServer, folder: Path
) -> None:
    dsn = await postgres.create_database("fuzz_markers")
    async with run_topology(kafka, dsn, folder, roles=["intake"]) as topology:
        fuzz = Fuzz(topology, _SEED)
        fuzz.markers_last()

        async def at_the_end() -> bool:
            return not [place for place in await fuzz.behind() if "intake" in place]

        await until(at_the_end, "the offsets behind the markers", 30)
