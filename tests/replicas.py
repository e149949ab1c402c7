"""Several Postgres servers for a test: one writes, another is its standby and takes over, and has one in its turn."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from deploy.local.part import Part
from deploy.local.ports import LOOPBACK, Ports
from deploy.local.postgres import SUPERUSER, PostgresServer
from deploy.local.process import run
from sinks.database import connect, is_transient
from tests.topology import until

_START_SECONDS = 120.0
_NEVER = 100_000.0


class Replica:
    """One server. A kill is for good: nothing starts it again."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder / name
        ports = Ports(folder / f"{name}.json")
        self.port = ports.choose("postgres")
        self.server = PostgresServer(self._folder, folder / f"{name}.log", ports, {"fsync": "off"})
        self.part = Part(name, self.server.launch, self.server.ready, lambda: None)

    async def start(self) -> None:
        """With the data that is there, or none."""
        await self.server.prepare()
        await self.part.start(_START_SECONDS)
        self.server.published = True

    async def restart(self) -> None:
        """An ordinary one, ended by an administrator."""
        pid = self.part.pid
        assert pid
        os.kill(pid, signal.SIGINT)

        async def is_back() -> bool:
            return self.part.pid not in (None, pid) and await self._takes_sessions()

        await until(is_back, "the restarted server")

    async def _takes_sessions(self) -> bool:
        try:
            connection = await connect(self.server.url("postgres"))
        except Exception as error:
            if not is_transient(error):
                raise
            return False
        await connection.close()
        return True

    async def copy_from(self, primary: Replica) -> None:
        """Become the primary's standby."""
        self._folder.mkdir()
        self.server._user = primary.server._user
        self.server._own(self._folder, 0o700)
        shutil.copy(primary._folder / "password", self._folder / "password")
        password = (self._folder / "password").read_text().strip()
        source = f"postgresql://{SUPERUSER}:{password}@{LOOPBACK}:{primary.port}/postgres?application_name=standby"
        program = str(primary.server._programs / "pg_basebackup")
        data = str(self._folder / "data")
        command = primary.server._command(program, "-D", data, "-d", source, "-R", "-X", "stream", "-c", "fast")
        assert await run(command, _START_SECONDS) == 0
        await self.server.prepare()
        self.server.published = True
        await self.part.start(_START_SECONDS)
        await until(self._takes_sessions, "a standby that can be asked")
        await until(lambda: primary.streams(), "a standby that follows")

    async def streams(self) -> bool:
        """Whether a standby follows this server."""
        return await self._sender() is not None

    async def _sender(self) -> int | None:
        connection = await connect(self.server.url("postgres"))
        try:
            pid: int | None = await connection.fetchval(
                "select pid from pg_stat_replication where state = 'streaming' limit 1"
            )
            return pid
        finally:
            await connection.close()

    async def cut_off(self) -> int:
        """From here on no commit reaches the standby; returns the process to be ended with the server."""
        pid = await self._sender()
        assert pid
        os.kill(pid, signal.SIGSTOP)
        return pid

    def kill(self, *others: int) -> None:
        """As when its machine is gone."""
        assert self.part.pid
        self.part.hold(_NEVER)
        os.kill(self.part.pid, signal.SIGKILL)
        for each in others:
            os.kill(each, signal.SIGKILL)

    async def promote(self) -> None:
        """Become the primary."""
        connection = await connect(self.server.url("postgres"))
        try:
            assert await connection.fetchval("select pg_promote(true, 60)")
        finally:
            await connection.close()


@asynccontextmanager
async def replicas(folder: Path, count: int) -> AsyncIterator[list[Replica]]:
    """So many servers with ports of their own; the first one is started."""
    folder.mkdir()  # noqa: ASYNC240
    folder.chmod(0o711)  # noqa: ASYNC240 - started by root, Postgres runs as a user of its own
    found = [Replica(folder, f"replica{n}") for n in range(count)]
    async with AsyncExitStack() as opened:
        for each in found:
            opened.push_async_callback(each.part.stop)
        await found[0].start()
        yield found


def address(found: list[Replica], name: str) -> str:
    """The database on whichever of the servers takes writes."""
    first = found[0].server.url(name)
    credentials = first.removeprefix("postgresql://").split("@")[0]
    hosts = ",".join(f"{LOOPBACK}:{each.port}" for each in found)
    return f"postgresql://{credentials}@{hosts}/{name}?target_session_attrs=read-write"


async def is_gone(part: Part) -> None:
    """Wait until a killed server's process is."""
    while part.pid is not None:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
