"""A triggers worker with a name of its own in the group (TIDEMARK_GROUP_INSTANCE_ID) restarts, and nothing moves."""

from __future__ import annotations

import os
import signal
import uuid
from pathlib import Path
from typing import Any

import aiohttp
from confluent_kafka.admin import AdminClient

from deploy.local.stack import Stack
from tests.topology import settings_for, until


def members(stack: Stack) -> dict[str, set[str]]:
    """Partitions by instance id, as the broker has them."""
    admin = AdminClient({"bootstrap.servers": stack.settings.bootstrap_servers})
    group = stack.settings.group("triggers")
    found: Any = admin.describe_consumer_groups([group])[group].result(timeout=30)
    return {
        member.group_instance_id or member.member_id: {
            f"{tp.topic}:{tp.partition}" for tp in member.assignment.topic_partitions
        }
        for member in found.members
    }


def assignments(stack: Stack) -> int:
    """How often a worker has been assigned partitions, by its own log."""
    return (stack.settings.data_dir / "logs" / "triggers.log").read_text().count("Executing _on_partitions_assigned")


async def lists_the_whole_table(stack: Stack) -> bool:
    """It answers for its own partitions and has asked the other worker for the others."""
    async with aiohttp.ClientSession() as web, web.get(f"{stack.worker_url('triggers')}/api/triggers") as response:
        return response.status == 200


async def test_a_restart_moves_no_partition(kafka: str, empty_database: str, folder: Path) -> None:
    prefix = f"t{uuid.uuid4().hex[:8]}-"
    restarted, other = (
        Stack(
            settings_for(
                kafka, empty_database, folder, topic_prefix=prefix, data_dir=folder / f"{prefix}{name}",
                group_instance_id=name, session_timeout_seconds=60,  # longer than a restart takes
            ),
            roles=["triggers"],
        )
        for name in ("triggers-0", "triggers-1")
    )  # fmt: skip
    try:
        await restarted.start()
        await other.start()

        async def share() -> bool:
            return len(held := members(other)) == 2 and all(held.values())

        await until(share, "both in the group")
        held, before = members(other), assignments(other)
        worker = restarted.workers["triggers"]
        assert worker.pid
        os.kill(worker.pid, signal.SIGTERM)

        async def again() -> bool:
            return worker.restarts == 1 and worker.ready

        await until(again, "the worker that was restarted")
        for stack in (restarted, other):
            await until(lambda stack=stack: lists_the_whole_table(stack), "the whole table")
        assert held.keys() == {"triggers-0", "triggers-1"}
        assert members(other) == held
        assert assignments(other) == before
    finally:
        await restarted.stop()
        await other.stop()
