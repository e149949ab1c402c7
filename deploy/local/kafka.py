"""One Kafka broker in KRaft mode on the loopback."""

from __future__ import annotations

import asyncio
import base64
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from deploy.local import jars
from deploy.local.errors import StackError
from deploy.local.ports import LOOPBACK, Ports, answers, is_free
from deploy.local.process import Command, last_line, run

MAX_RECORD_BYTES = 2 * 1024 * 1024
_FORMAT_TIMEOUT = 120.0
_ASK_TIMEOUT = 5.0
_HEAP = "-Xms256m -Xmx512m"  # unless the environment has KAFKA_HEAP_OPTS, as Kafka's own scripts call it
_JVM = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Djava.awt.headless=true")

# The voters are named in the settings (and not by `format --standalone`, which writes the controller's port into
# the log for good), so that a stack may start again on other ports.
_SERVER = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller}
controller.listener.names=CONTROLLER
inter.broker.listener.name=BROKER
listener.security.protocol.map=BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT
listeners=BROKER://{host}:{broker},CONTROLLER://{host}:{controller}
advertised.listeners=BROKER://{host}:{broker}
log.dirs={data}
auto.create.topics.enable=false
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.min.session.timeout.ms=1000
group.initial.rebalance.delay.ms=0
message.max.bytes={record}
replica.fetch.max.bytes={record}
log.cleaner.backoff.ms=1000
log.cleaner.dedupe.buffer.size=33554432
num.network.threads=2
num.io.threads=4
"""

_LOGGING = """\
status=error
rootLogger.level=warn
rootLogger.appenderRef.stdout.ref=stdout
logger.authorizer.name=kafka.authorizer.logger
logger.authorizer.level=info
appender.stdout.type=Console
appender.stdout.name=stdout
appender.stdout.layout.type=PatternLayout
appender.stdout.layout.pattern=%d{yyyy-MM-dd HH:mm:ss.SSS} %-5p %c{1}: %m%n
"""


class KafkaServer:
    """A broker with its data in `folder`; they, its cluster id and if possible its ports survive restarts.

    name: what its ports are remembered under; extra: further lines of server.properties, which win over ours; cluster:
    the id of a cluster of several; users: SCRAM credentials that exist from the start, as `kafka-storage` takes them;
    client: how to speak to it, where not as everyone may.
    """

    def __init__(
        self,
        folder: Path,
        log: Path,
        ports: Ports,
        name: str = "kafka",
        extra: str = "",
        cluster: str | None = None,
        users: Sequence[str] = (),
        client: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = folder
        self._log = log
        self._ports = ports
        self._name = name
        self._extra = extra
        self._cluster = cluster or cluster_id()
        self._users = users
        self._client = client or {}
        self._classpath = ""
        self._broker = 0
        self._controller = 0
        self.published = False
        """Once the address has been given out a restart must keep it."""

    @property
    def url(self) -> str:
        """The address clients use."""
        return f"kafka://{LOOPBACK}:{self._broker}"

    async def prepare(self, on_fetch: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Fetch the jars and format the data folder, where that has not been done.

        on_fetch is told, from another thread, how many of the missing jars have been fetched.
        """
        self._classpath = await asyncio.to_thread(jars.classpath, on_fetch)
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "log4j2.properties").write_text(_LOGGING)
        self._configure()
        if not (self._folder / "data" / "bootstrap.checkpoint").exists():
            await self._format()

    def launch(self) -> Command:
        """The command that starts the broker, on ports that are free now unless the address is already in use."""
        if not (self.published and is_free(self._controller)):
            self._configure()
        return self._java("kafka.Kafka", str(self._properties))

    async def ready(self) -> bool:
        """Whether the broker answers and has joined its own cluster."""
        if not await answers(LOOPBACK, self._broker):
            return False
        return self.published or await _has_joined(f"{LOOPBACK}:{self._broker}", self._client)

    @property
    def _properties(self) -> Path:
        return self._folder / "server.properties"

    def _configure(self) -> None:
        if not self.published:
            self._broker = self._ports.choose(self._name)
        self._controller = self._ports.choose(f"{self._name}-controller")
        self._properties.write_text(
            _SERVER.format(
                host=LOOPBACK,
                broker=self._broker,
                controller=self._controller,
                data=self._folder / "data",
                record=MAX_RECORD_BYTES,
            )
            + self._extra
        )

    async def _format(self) -> None:
        users = [argument for user in self._users for argument in ("--add-scram", user)]
        settings = ["-t", self._cluster, "-c", str(self._properties)]
        command = self._java("kafka.tools.StorageTool", "format", "--ignore-formatted", *settings, *users)
        try:
            code = await run(command, _FORMAT_TIMEOUT)
        except TimeoutError:
            raise StackError(f"Kafka did not format {self._folder / 'data'} in time: see {self._log}") from None
        if code != 0:
            raise StackError(f"Kafka cannot format its data folder ({last_line(self._log)}): see {self._log}")

    def _java(self, *arguments: str) -> Command:
        logging = f"-Dlog4j2.configurationFile={self._folder / 'log4j2.properties'}"
        heap = os.environ.get("KAFKA_HEAP_OPTS", _HEAP).split()
        return Command(
            argv=(jars.java(), *heap, *_JVM, logging, "-cp", self._classpath, *arguments),
            log=self._log,
            cwd=self._folder,
            grace_seconds=30,
        )


def cluster_id() -> str:
    """A random id in the form Kafka wants: 22 characters of URL-safe base64, not beginning with a hyphen."""
    while (text := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        pass
    return text


async def _has_joined(bootstrap: str, client: Mapping[str, Any]) -> bool:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap, request_timeout_ms=int(_ASK_TIMEOUT * 1000), **client)
    try:
        async with asyncio.timeout(_ASK_TIMEOUT):
            await admin.start()
            cluster = await admin.describe_cluster()
        return bool(cluster["brokers"])
    except (KafkaError, OSError, TimeoutError):
        return False
    finally:
        await admin.close()
