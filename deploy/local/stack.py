"""The local stack: Kafka, Postgres and a worker of each role, supervised as processes of this one.

What settings name (a broker, a database) is used instead of being started.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from pathlib import Path

from pydantic import SecretStr

from deploy.local import state
from deploy.local.kafka import KafkaServer
from deploy.local.part import Part
from deploy.local.ports import LOOPBACK, Ports, http_status
from deploy.local.postgres import PostgresServer
from deploy.local.process import Command
from sinks import database
from streams import topics
from streams.settings import ROLES, Settings

_START_SECONDS = 120.0


class Stack:
    """The stack of one DATA_DIR.

    settings: as named (streams.settings.load_named); report: told each step; program: what runs a worker.
    """

    def __init__(
        self,
        settings: Settings,
        report: Callable[[str], None] = lambda step: None,
        roles: Sequence[str] = ROLES,
        program: Sequence[str] = (sys.executable, "-m", "tidemark"),
    ) -> None:
        self._named = settings
        self._report = report
        self._roles = roles
        self._program = program
        self._folder = settings.data_dir.absolute()
        self._lock = state.DataDirLock(self._folder)
        self._ports = Ports(self._folder / "ports.json")
        self._servers: list[Part] = []
        self.workers: dict[str, Part] = {}
        """By role, once started."""
        self._web: dict[str, int] = {}
        self._ready = False
        self._running = False
        self.settings = settings
        """With the addresses filled in, once started."""

    async def start(self) -> None:
        """Start everything and return when it serves. Raises StackError, DatabaseError or TopicError; then nothing
        is left running."""
        self._lock.acquire()
        try:
            state.end_orphans(self._folder)
            self._running = True
            await self._start_servers()
            self._report("Schema and topics")
            await database.migrate(self.settings.dsn)
            await topics.ensure_topics(self.settings)
            await self._start_workers()
            self._ready = True
            self._write()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End everything, workers first; data stays."""
        self._running = False
        await asyncio.gather(*(worker.stop() for worker in self.workers.values()))
        for server in reversed(self._servers):
            await server.stop()
        state.remove(self._folder)
        self._lock.release()

    @property
    def restarts(self) -> int:
        """How often a part has died and was started again."""
        return sum(part.restarts for part in [*self._servers, *self.workers.values()])

    def worker_url(self, role: str) -> str:
        """The web server of the role's worker."""
        return f"http://{self._web_host}:{self._web[role]}"

    @property
    def web_url(self) -> str | None:
        """The console: the web server of the `triggers` worker."""
        return self.worker_url("triggers") if "triggers" in self._web else None

    async def _start_servers(self) -> None:
        addresses: dict[str, object] = {}
        logs = self._folder / "logs"
        kafka = postgres = None
        if self._named.database_url is None:
            self._report("Postgres")
            postgres = PostgresServer(self._folder / "postgres", logs / "postgres.log", self._ports)
            await postgres.prepare()
            self._servers.append(Part("postgres", postgres.launch, postgres.ready, self._write))
        if self._named.broker_url is None:
            self._report("Kafka")
            kafka = KafkaServer(self._folder / "kafka", logs / "kafka.log", self._ports)
            await kafka.prepare(lambda done, total: self._report(f"Kafka: {done} of {total} files fetched, once"))
            self._servers.append(Part("kafka", kafka.launch, kafka.ready, self._write))
        await _all(server.start(_START_SECONDS) for server in self._servers)
        if postgres:
            addresses["database_url"] = SecretStr(await postgres.create_database("tidemark"))
            postgres.published = True
        if kafka:
            addresses["broker_url"] = kafka.url
            kafka.published = True
        self.settings = self._named.model_copy(update=addresses)

    async def _start_workers(self) -> None:
        for role in self._roles:
            preferred = self._named.web_port or None
            self._web[role] = self._ports.choose(f"web-{role}", preferred if role == "triggers" else None)
            self.workers[role] = Part(
                role,
                partial(self._launch, role),
                partial(self._answers, role, "/readyz"),
                self._write,
                partial(self._answers, role, "/healthz"),
            )
        self._report(f"Workers: {', '.join(self._roles)}")
        await _all(worker.start(_START_SECONDS) for worker in self.workers.values())

    def _launch(self, role: str) -> Command:
        return Command(
            argv=(*self._program, "worker", role),
            log=self._folder / "logs" / f"{role}.log",
            cwd=Path.cwd(),
            env={
                **self.settings.environment(),
                "TIDEMARK_DATA_DIR": str(self._folder / f"worker-{role}"),
                "TIDEMARK_WEB_PORT": str(self._web[role]),
            },
            grace_seconds=30,
        )

    async def _answers(self, role: str, path: str) -> bool:
        token = self._named.web_token.get_secret_value() if self._named.web_token else None
        return await http_status(self._web_host, self._web[role], path, token) == 200

    @property
    def _web_host(self) -> str:
        return LOOPBACK if self._named.web_host == "0.0.0.0" else self._named.web_host  # noqa: S104 - only compared

    def _write(self) -> None:
        """Keep stack.json true."""
        if not self._running:
            return
        parts = [*self._servers, *self.workers.values()]
        database_url = self.settings.database_url
        state.write(
            self._folder,
            state.StackState(
                supervisor=state.this_process(),
                ready=self._ready and all(part.ready for part in parts),
                broker_url=self.settings.broker_url,
                database_url=database_url.get_secret_value() if database_url else None,
                web_url=self.web_url,
                workers=[
                    state.WorkerState(
                        role, role, part.pid, self.worker_url(role), part.ready, part.restarts, part.last_exit
                    )
                    for role, part in self.workers.items()
                ],
                processes=[found for part in parts if (found := part.state)],
            ),
        )


async def _all(starts: Iterable[Coroutine[None, None, None]]) -> None:
    """All at once; the first that fails stops the others."""
    try:
        async with asyncio.TaskGroup() as group:
            for start in starts:
                group.create_task(start)
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
