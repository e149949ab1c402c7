"""What a chaos run breaks: one broker or three, Postgres, and a proxy in front of each that has one."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.local.kafka import KafkaServer, cluster_id
from deploy.local.part import Part
from deploy.local.ports import LOOPBACK, Ports
from deploy.local.postgres import PostgresServer
from tests.chaos.proxy import Proxy

_START_SECONDS = 180.0

_ONE = "advertised.listeners=BROKER://{host}:{advertised}\n"
_SEVERAL = """\
node.id={node}
controller.quorum.voters={voters}
offsets.topic.replication.factor=3
transaction.state.log.replication.factor=3
share.coordinator.state.topic.replication.factor=3
"""


@dataclass(frozen=True)
class Cluster:
    """The servers of one run. dsn and bootstrap lead through the proxies, direct_dsn around them."""

    folder: Path
    brokers: list[Part]
    postgres: Part
    bootstrap: str
    dsn: str
    direct_dsn: str
    kafka_proxy: Proxy | None
    postgres_proxy: Proxy


@asynccontextmanager
async def run_cluster(brokers: int) -> AsyncIterator[Cluster]:
    """Start everything; remove everything afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="tidemark-chaos-"))
    folder.chmod(0o711)  # noqa: ASYNC240 - started by root, Postgres runs as a user of its own
    ports = Ports(folder / "ports.json")
    async with AsyncExitStack() as opened:
        opened.callback(shutil.rmtree, folder, ignore_errors=True)
        postgres = PostgresServer(folder / "postgres", folder / "postgres.log", ports)
        postgres_proxy = Proxy(lambda: port_of(postgres.url()))
        await postgres_proxy.start()
        opened.push_async_callback(postgres_proxy.close)
        kafka_proxy, servers = await _brokers(folder, ports, brokers, opened)
        await postgres.prepare()
        parts = [Part(f"kafka-{n}", server.launch, server.ready, lambda: None) for n, server in enumerate(servers, 1)]
        postgres_part = Part("postgres", postgres.launch, postgres.ready, lambda: None)
        for part in (*parts, postgres_part):
            opened.push_async_callback(part.stop)
        await asyncio.gather(*(part.start(_START_SECONDS) for part in (*parts, postgres_part)))
        for server in servers:
            server.published = True
        direct = await postgres.create_database("chaos")
        postgres.published = True
        yield Cluster(
            folder,
            parts,
            postgres_part,
            f"{LOOPBACK}:{kafka_proxy.port}"
            if kafka_proxy
            else ",".join(server.url.removeprefix("kafka://") for server in servers),
            direct.replace(f":{port_of(direct)}/", f":{postgres_proxy.port}/"),
            direct,
            kafka_proxy,
            postgres_proxy,
        )


async def _brokers(
    folder: Path, ports: Ports, count: int, opened: AsyncExitStack
) -> tuple[Proxy | None, list[KafkaServer]]:
    """A single broker stands behind a proxy; several advertise themselves."""
    names = [f"kafka-{n}" for n in range(1, count + 1)]
    proxy: Proxy | None = None
    if count == 1:
        proxy = Proxy(lambda: port_of(servers[0].url))
        await proxy.start()
        opened.push_async_callback(proxy.close)
        extra = {names[0]: _ONE.format(host=LOOPBACK, advertised=proxy.port)}
    else:
        voters = ",".join(f"{n}@{LOOPBACK}:{ports.choose(f'{name}-controller')}" for n, name in enumerate(names, 1))
        extra = {name: _SEVERAL.format(node=n, voters=voters) for n, name in enumerate(names, 1)}
    cluster = cluster_id()
    servers = [KafkaServer(folder / name, folder / f"{name}.log", ports, name, extra[name], cluster) for name in names]
    for server in servers:
        await server.prepare()
    return proxy, servers


def port_of(url: str) -> int:
    """The port in an address."""
    return int(url.rsplit(":", 1)[1].split("/")[0])
