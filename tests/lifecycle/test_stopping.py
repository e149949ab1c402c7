"""Workers are told to stop while Postgres or Kafka is gone or silent: they end by themselves, and nothing is lost."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable

import pytest

from deploy.local.part import Part
from deploy.local.stack import Stack
from sinks.database import connect_pool
from streams.settings import ROLES, load_named
from tests.chaos.cluster import Cluster, run_cluster
from tests.lifecycle.load import all_ready, books_are_right, flowing
from tests.topology import Topology, until

_SHUTDOWN_SECONDS = 4.0
_HELD_SECONDS = 600.0  # a server stays away until the workers have ended


async def test_workers_end_while_a_server_is_away(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "aiokafka")  # the producer of the load says each try
    async with run_cluster(1) as cluster:
        settings = load_named(
            broker_url=f"kafka://{cluster.bootstrap}",
            database_url=cluster.dsn,
            data_dir=cluster.folder / "stack",
            internal_partitions=2,
            input_partitions=2,
            session_timeout_seconds=6,
            shutdown_seconds=_SHUTDOWN_SECONDS,
            repair_after_seconds=5,
        )
        stack = Stack(settings)
        await stack.start()
        pool = await connect_pool(cluster.direct_dsn, size=2)
        topology = Topology(stack, pool)
        try:
            async with flowing(topology, seed=5) as flow:
                for name, (away, back) in faults(cluster).items():
                    await until(lambda: all_ready(stack), f"everything ready before: {name}")
                    before = {role: stack.workers[role].pid for role in ROLES}
                    away()
                    for pid in before.values():
                        assert pid
                        os.kill(pid, signal.SIGTERM)
                    await until(lambda before=before: ended(stack, before), name)
                    back()
                await until(lambda: all_ready(stack), "everything ready in the end")
            await books_are_right(topology, flow)
        finally:
            await pool.close()
            await stack.stop()


def faults(cluster: Cluster) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    """How each server goes away and comes back."""
    assert cluster.kafka_proxy is not None
    return {
        "Postgres is silent": silence(cluster.postgres_proxy),
        "Kafka is silent": silence(cluster.kafka_proxy),
        "Postgres is gone": (lambda: crash(cluster.postgres, signal.SIGQUIT), cluster.postgres.let_go),
        "Kafka is gone": (lambda: crash(cluster.brokers[0], signal.SIGKILL), cluster.brokers[0].let_go),
    }


def silence(proxy: object) -> tuple[Callable[[], None], Callable[[], None]]:
    """Connections stay, nothing passes."""
    return (lambda: setattr(proxy, "stopped", True)), (lambda: setattr(proxy, "stopped", False))


def crash(part: Part, how: signal.Signals) -> None:
    """It is back when it is let go."""
    assert part.pid
    part.hold(_HELD_SECONDS)
    os.kill(part.pid, how)


async def ended(stack: Stack, before: dict[str, int | None]) -> bool:
    """Whether those processes are gone; their supervisor only ever starts others."""
    return all(stack.workers[role].pid != pid for role, pid in before.items())
