"""`make fuzz MINUTES=5`: rounds of mutated records, each with a seed of its own, on real workers of every role."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

import click

from deploy.local.kafka import KafkaServer
from deploy.local.ports import Ports
from deploy.local.postgres import PostgresServer
from tests.fuzz.run import Fuzz
from tests.servers import serving
from tests.topology import run_topology


@click.command()
@click.option("--minutes", default=5.0, show_default=True)
@click.option("--seed", default=None, type=int, help="Of the first round; without it, the time.")
@click.option("--records", default=10_000, show_default=True, help="Of a round.")
def main(minutes: float, seed: int | None, records: int) -> None:
    """Send mutated records to every topic until the time is up. Ends with an error at the first that is not right."""
    folder = Path(tempfile.mkdtemp(prefix="tidemark-fuzz-"))
    folder.chmod(0o711)  # started by root, Postgres runs as a user of its own
    asyncio.run(_rounds(folder, minutes, int(time.time()) if seed is None else seed, records))


async def _rounds(folder: Path, minutes: float, seed: int, records: int) -> None:
    ports = Ports(folder / "ports.json")
    kafka = KafkaServer(folder / "kafka", folder / "kafka.log", ports)
    postgres = PostgresServer(folder / "postgres", folder / "postgres.log", ports)
    until = time.monotonic() + 60 * minutes
    async with serving("kafka", kafka), serving("postgres", postgres):
        while True:
            print(f"seed {seed}, in {folder}", flush=True)
            database = f"fuzz_{seed}"
            dsn = await postgres.create_database(database)
            async with run_topology(kafka.url, dsn, folder, repair_after_seconds=3) as topology:
                fuzz = Fuzz(topology, seed)
                await fuzz.send(records)
                await fuzz.finish()
                print(f"seed {seed}: {await fuzz.check()}", flush=True)
            await postgres.drop_database(database)
            seed += 1
            if time.monotonic() >= until:
                return


if __name__ == "__main__":
    main()
