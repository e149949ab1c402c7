"""Workers are restarted one by one, twice over, while records arrive: nobody else notices."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from streams.settings import ROLES
from tests.lifecycle.load import books_are_right, flowing
from tests.topology import Topology, run_topology, until

_ROUNDS = 2
_SESSION_SECONDS = 60  # longer than a restart takes, however busy the machine is


async def claims(topology: Topology) -> dict[tuple[str, str, int], int]:
    """How often each partition has been claimed: once for each assignment."""
    rows = await topology.pool.fetch("select consumer_group, topic, partition, epoch from kafka_offsets")
    return {(row["consumer_group"], row["topic"], row["partition"]): row["epoch"] for row in rows}


async def test_rolling_restarts_under_load(kafka: str, empty_database: str, folder: Path) -> None:
    async with run_topology(
        kafka,
        empty_database,
        folder,
        group_instance_id="roller",
        session_timeout_seconds=_SESSION_SECONDS,
        repair_after_seconds=5,
    ) as topology:
        before = await claims(topology)
        async with flowing(topology, seed=1) as flow:
            for restarted in range(1, _ROUNDS + 1):
                for role in ROLES:
                    await restart(topology, role, restarted)
        await books_are_right(topology, flow)
        print({role: round(gap, 1) for role, gap in flow.gaps.items()}, len(flow.sent))
        assert max(flow.gaps.values()) < _SESSION_SECONDS, "somebody waited for the end of a session"
        after = await claims(topology)
        # A restart is one claim; were the group to rebalance once more, there would be another.
        assert {after[partition] - before[partition] for partition in before} <= {_ROUNDS}
        for role in ROLES:
            topology.stack.workers[role].restarts = 0  # on purpose


async def restart(topology: Topology, role: str, number: int) -> None:
    """In order, as a deployment does it; the supervisor starts it again."""
    worker = topology.stack.workers[role]
    assert worker.pid
    os.kill(worker.pid, signal.SIGTERM)

    async def again() -> bool:
        return worker.restarts == number and worker.ready

    await until(again, f"{role}, started again")
    log = (topology.settings.data_dir / "logs" / f"{role}.log").read_text()
    assert worker.last_exit == 0, log[-2000:]
