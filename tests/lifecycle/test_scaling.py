"""One worker of a role, three, and one again, while records arrive."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from deploy.local.stack import Stack
from tests.lifecycle.load import all_ready, books_are_right, flowing
from tests.topology import Topology, run_topology, until

_ROLES = ("intake", "triggers", "books")
_READ = "select topic, partition, next_offset from kafka_offsets where topic like any('{%-prices,%-transactions}')"
_MEMBERS = "select count(*) from workers where role = any($1::text[]) and missing is null"


async def offsets(topology: Topology) -> dict[tuple[str, int], int]:
    """How far the partitions of the topics with many records have been read."""
    rows = await topology.pool.fetch(_READ)
    return {(row["topic"], row["partition"]): row["next_offset"] for row in rows}


async def test_from_one_to_three_and_back(kafka: str, empty_database: str, folder: Path) -> None:
    async with run_topology(
        kafka, empty_database, folder, input_partitions=4, internal_partitions=4, repair_after_seconds=5
    ) as topology:
        async with AsyncExitStack() as more, flowing(topology, seed=2) as flow:
            for number in (2, 3):
                settings = topology.settings.model_copy(
                    update={"data_dir": Path(f"{topology.settings.data_dir}-{number}")}
                )
                stack = Stack(settings, roles=_ROLES)
                await stack.start()
                more.push_async_callback(stack.stop)

            async def three() -> bool:
                return await topology.pool.fetchval(_MEMBERS, list(_ROLES)) == 3 * len(_ROLES)

            await until(three, "three workers of each role")
            before = await offsets(topology)

            async def all_moved_on() -> bool:
                return all(offset > before[place] for place, offset in (await offsets(topology)).items())

            await until(all_moved_on, "work for all of them")
            await more.aclose()
            await until(lambda: all_ready(topology.stack), "the first ones, alone again")
        await books_are_right(topology, flow)
