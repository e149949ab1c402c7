"""One worker of a role, three, and one again, while records arrive."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from deploy.local.stack import Stack
from tests.lifecycle.load import all_ready, books_are_right, flowing
from tests.topology import run_topology, until

_ROLES = ("intake", "triggers", "books")
_MEMBERS = "select count(*) from workers where role = any($1::text[]) and missing is null"


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

            await until(three, "three workers of each role", 60)
            await asyncio.sleep(5)  # a while of work for all of them
            await more.aclose()
            await until(lambda: all_ready(topology.stack), "the first ones, alone again", 60)
        await books_are_right(topology, flow)
