"""What the four Faust apps share: settings, the pool, the offsets, health and metrics."""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import faust
import faust.app.router
from faust.types import TP
from yarl import URL

from sinks import generation, outbox
from sinks.batches import Place
from sinks.database import Pool, connect_pool, is_transient
from sinks.offsets import Offsets
from sinks.session import PATIENCE
from streams import codecs, logs, tracing
from streams.kafka_clients import password, ssl_context, token_provider
from streams.membership import Lease
from streams.pulse import Pulse
from streams.settings import Settings
from streams.table_recovery import Table, Tables
from streams.transport import BatchApp, BatchLimits
from streams.trials import Trials
from streams.web.access import Access, protect
from streams.web.parameters import LARGEST_BODY, readable
from streams.web.problems import Problem, answer_problems

logger = logging.getLogger(__name__)
logging.getLogger("aiohttp.server").addFilter(logs.is_no_bad_request)

_HINT_SECONDS = 0.005  # a burst of commits costs one NOTIFY


class _Router(faust.app.router.Router):  # type: ignore[misc]
    """Faust asks its producer for a key's partition, which knows a topic only once it has produced to it."""

    def key_store(self, table_name: str, key: bytes | str) -> URL:
        """The worker that holds the key. Raises KeyError while that is not known for certain."""
        if table_name not in self.app.tables:
            raise Problem("not-found", "there is no such table")
        topic = self.app.tables[table_name].changelog_topic_name
        raw = key.encode() if isinstance(key, str) else key
        return self.holder(TP(topic, self.app.consumer.key_partition(topic, raw)))

    def holder(self, partition: TP) -> URL:
        """The worker that holds a partition of a table. Raises KeyError while that is not known for certain."""
        if not self.app.settled:
            raise KeyError(partition)
        return URL(self._assignor._tps_url[partition])


class _Monitor(faust.Monitor):  # type: ignore[misc]
    """Faust only counts a changelog record that could not be sent, and acknowledges its source all the same."""

    fail: Callable[[str], None]

    def on_send_error(self, producer: Any, exc: BaseException, state: Any) -> None:
        """Stop the worker."""
        super().on_send_error(producer, exc, state)
        self.fail(f"a record could not be sent: {type(exc).__name__}: {exc}")


class App(BatchApp):
    """One role's Faust app. Settings are read once; Postgres is connected at the first use."""

    access: Access
    trials: Trials

    def __init__(self, role: str, settings: Settings) -> None:
        settings.check_web()
        codecs.check()
        self.role = role
        self.settings = settings
        self._pool: Pool | None = None
        self._pool_lock = asyncio.Lock()
        self._hint = asyncio.Event()
        self.access = Access(settings)
        self.lease = Lease(settings.session_timeout_seconds)
        self.traces = tracing.start(role, settings)
        self.pulse = Pulse(settings.standstill_seconds, lambda: PATIENCE.age)
        self._from_start: list[Callable[[], Awaitable[None]]] = []
        super().__init__(settings.group(role), **_faust_settings(role, settings, self.access))
        self.offsets = Offsets(self.pool, settings.group(role), lambda: self.should_stop)
        self.trials = Trials(self)
        self.monitor.fail = self.fail
        self.task(self._send_hints)

    async def pool(self) -> Pool:
        """The worker's connections to Postgres."""
        async with self._pool_lock:
            if self._pool is None:
                self._pool = await connect_pool(self.settings.dsn, size=8, name=f"tidemark-{self.role}")
            return self._pool

    def input(self, name: str) -> Any:
        """A topic whose offsets Postgres owns, in batches."""
        return self.batch_topic(self.settings.topic(name), BatchLimits(self.settings.batch_records))

    def fenced(self, place: Place) -> None:
        """A transaction was refused. Usually the partition is another's, and a rebalance says so soon.

        Where none comes, the claim that fenced this worker came late, from one that is no longer the owner (it was
        frozen, or Postgres did not answer). Nobody would claim again: stop, so that this worker is started anew.
        """
        self.add_future(self._stop_unless_rebalanced(place))

    async def _stop_unless_rebalanced(self, place: Place) -> None:
        await self.sleep(2 * self.settings.session_timeout_seconds)
        held = self.offsets.held((place.topic, place.partition))
        is_assigned = TP(place.topic, place.partition) in self.consumer.assignment()
        if not self.should_stop and is_assigned and held and held.epoch == place.epoch:
            self.fail(f"{place.topic}[{place.partition}]: claimed by a worker that is not its owner; claiming anew")

    def outbox_written(self) -> None:
        """Hint to the relay, sent soon by a task of its own: nothing waits for it."""
        self._hint.set()

    def stopping(self, loop: str) -> Callable[[], bool]:
        """The question whether to stop, for a loop to ask at each turn: one that no longer asks stands still."""
        return self.pulse.until(lambda: self.should_stop, loop)

    async def _send_hints(self) -> None:
        while not self.should_stop:
            await self._hint.wait()
            self._hint.clear()
            try:
                await outbox.wake(await self.pool())
            except Exception as error:
                if not is_transient(error):
                    raise
            await asyncio.sleep(_HINT_SECONDS)

    def forever(self, body: Callable[[], Awaitable[None]]) -> None:
        """Run the body as a task; it handles its own transient errors, so an error that leaves it stops the worker."""

        async def guarded() -> None:
            try:
                await body()
            except Exception as error:
                logger.exception("%s", body)
                self.fail(f"{type(error).__name__}: {error}")

        self.task(guarded)

    def from_start(self, body: Callable[[], Awaitable[None]]) -> None:
        """Run the body beside the app from its start on, while a table recovers too."""
        self._from_start.append(body)

    async def on_start(self) -> None:
        """Begin with what runs from the start."""
        await super().on_start()
        for body in self._from_start:
            self.add_future(body())

    @property
    def partitions(self) -> list[str]:
        """What is assigned to this worker now, as topic:partition."""
        return (
            [f"{tp.topic}:{tp.partition}" for tp in sorted(self.assignor.assigned_actives())] if self.consumer else []
        )

    @property
    def restore_remaining(self) -> int:
        """Changelog records still to be read before the table serves."""
        return sum(self.tables.recovery.active_remaining().values())

    @property
    def standby_remaining(self) -> int:
        """Changelog records that the copies of others' partitions kept here have yet to take in."""
        recovery = self.tables.recovery
        if self._recovering or self.should_stop:
            return 0
        ends = {tp: self.consumer.highwater(tp) for tp in recovery.standby_tps & self.consumer.assignment()}
        return sum(
            max(0, (recovery.standby_highwaters[tp] + 1 if end is None else end) - recovery.standby_offsets[tp] - 1)
            for tp, end in ends.items()
        )

    @property
    def settled(self) -> bool:
        """Whether this worker's tables may be believed: assigned, recovered, and certainly still a member."""
        return self.lease.held and not self._recovering and not self.should_stop

    @property
    def _recovering(self) -> bool:
        return self.rebalancing or self.in_recovery or not self.tables.recovery.completed.is_set()

    async def stop(self) -> None:
        """Stop in order: finish what is in hand, commit, leave the group. What waits for a broker or a database that
        is gone is abandoned after SHUTDOWN_SECONDS, as by a crash, which harms nothing."""
        reason = f"not stopped in order within {self.settings.shutdown_seconds:g} s: abandoned what it waited for"
        patience = threading.Timer(self.settings.shutdown_seconds, self.fail, [reason])
        patience.daemon = True
        patience.start()
        await super().stop()

    async def ready(self) -> str | None:
        """None when recovered, assigned and the database reachable; else what is missing."""
        if self._recovering:
            return "recovering"
        if self.tables and not self.lease.held:
            return "membership of the group not confirmed"
        try:
            async with asyncio.timeout(2), (await self.pool()).acquire() as connection:
                is_open = await generation.is_open(connection)
        except Exception as error:
            return f"database: {type(error).__name__}"
        return None if is_open else "database: not confirmed"


def _faust_settings(role: str, settings: Settings, access: Access) -> dict[str, Any]:
    data_dir = Path(settings.data_dir).absolute()
    data_dir.mkdir(parents=True, exist_ok=True)
    session = settings.session_timeout_seconds
    return {
        "broker": [f"kafka://{server}" for server in settings.bootstrap_servers.split(",")],
        "broker_credentials": _credentials(settings),
        "store": "rocksdb://" if role == "triggers" else "memory://",
        "datadir": str(data_dir / f"tables-{role}"),
        "key_serializer": "raw",
        "value_serializer": "raw",
        "processing_guarantee": "at_least_once",
        "topic_allow_declare": False,
        "topic_disable_leader": True,
        "topic_partitions": settings.internal_partitions,
        "topic_replication_factor": settings.replication_factor,
        "table_standby_replicas": 1,
        "stream_wait_empty": True,
        "stream_buffer_maxsize": 4096,
        "broker_max_poll_records": 500,
        "broker_session_timeout": session,
        "consumer_group_instance_id": settings.group_instance_id,
        "broker_heartbeat_interval": session / 10,  # how soon a member hears that the group changes
        "broker_commit_interval": 1.0,
        "producer_acks": -1,
        "producer_request_timeout": 30.0,
        "producer_max_request_size": 2 * 1024 * 1024,
        "web_bind": settings.web_host,
        "web_host": settings.web_host,
        "web_port": settings.web_port or free_port(settings.web_host),
        "web_application_options": {
            "middlewares": [protect, answer_problems, readable, access.middleware()],
            "client_max_size": LARGEST_BODY,
        },
        "worker_redirect_stdouts": False,
        "logging_config": logs.configuration() if settings.log_format == "json" else logs.text_configuration(),
        "Monitor": _Monitor,
        "Router": _Router,
        "Table": Table,
        "TableManager": Tables,
    }


def free_port(host: str) -> int:
    """A port that was free a moment ago."""
    import socket

    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _credentials(settings: Settings) -> Any:
    context: ssl.SSLContext | None = ssl_context(settings)
    if settings.security_protocol.startswith("SASL"):
        if settings.sasl_mechanism == "OAUTHBEARER":
            return faust.OAuthCredentials(oauth_cb=token_provider(settings), ssl_context=context)
        return faust.SASLCredentials(
            username=settings.sasl_username,
            password=password(settings),
            mechanism=settings.sasl_mechanism,
            ssl_context=context,
        )
    return faust.SSLCredentials(context) if context else None
