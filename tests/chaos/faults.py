"""The faults: each is bounded, acts on processes that the run has started, and leaves healing to the supervisors."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from deploy.local.errors import StackError
from deploy.local.part import Part
from deploy.local.stack import Stack
from sinks.database import DatabaseError, connect, is_transient
from streams.settings import Settings
from streams.topics import TopicError
from tests.chaos.cluster import Cluster
from tests.chaos.proxy import Proxy

_JOINS = 10
_CUTS = 3  # of each kind, at COMMITs
_SILENCES = 2  # of each kind, at COMMITs
_DEAF_SECONDS = 3.0
_FIND_A_COMMIT_SECONDS = 15.0
_HEIR_SECONDS = 5.0  # beyond the session


@dataclass(frozen=True)
class Victims:
    """What a fault may hit."""

    cluster: Cluster
    stack: Stack
    spare: Stack
    settings: Settings
    program: Sequence[str]

    @property
    def session_seconds(self) -> float:
        """After so long without a heartbeat the broker gives a worker's partitions away."""
        return self.settings.session_timeout_seconds

    def worker(self, chance: random.Random, *roles: str) -> Part:
        """A worker of one of the roles (none: any), of the stack or of the spare."""
        workers = [*self.stack.workers.values(), *self.spare.workers.values()]
        return chance.choice([worker for worker in workers if not roles or worker.name in roles])


Fault = Callable[[Victims, random.Random], Awaitable[str]]


def _signal(part: Part, number: signal.Signals) -> str:
    if part.pid is not None:
        os.kill(part.pid, number)
    return f"{number.name} {part.name}"


async def kill_worker(victims: Victims, chance: random.Random) -> str:
    """kill -9, mostly of a worker with input partitions."""
    return _signal(victims.worker(chance, *chance.choice([("intake",), ()])), signal.SIGKILL)


async def lose_worker(victims: Victims, chance: random.Random) -> str:
    """kill -9 of a worker with input partitions, as with its host: it does not come back before it has an heir."""
    workers = [stack.workers["intake"] for stack in (victims.stack, victims.spare)]
    if not await _until(lambda: all(worker.ready for worker in workers), 2 * victims.session_seconds):
        return "nobody to lose: there would be no heir"
    worker = chance.choice(workers)
    worker.hold(victims.session_seconds + _HEIR_SECONDS)
    return f"{_signal(worker, signal.SIGKILL)}, not started again for long"


async def end_worker(victims: Victims, chance: random.Random) -> str:
    """A clean stop in the middle of work; the supervisor starts it again, so the group changes twice."""
    return _signal(victims.worker(chance), signal.SIGTERM)


async def freeze_worker(victims: Victims, chance: random.Random) -> str:
    """A zombie: stopped past its session, its partitions taken over, then awake with work in hand."""
    worker = victims.worker(chance, "intake", "intake", "resets", "triggers")
    pid = worker.pid
    if pid is None:
        return "nobody to freeze"
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(victims.session_seconds + chance.uniform(1, 3))
    finally:
        os.kill(pid, signal.SIGCONT)
    return f"freeze {worker.name}"


async def join_and_leave(victims: Victims, chance: random.Random) -> str:
    """One more worker of a role joins the group, works for a while and leaves in order."""
    role = chance.choice(["intake", "resets", "triggers", "books"])
    folder = victims.settings.data_dir.parent / f"joining-{chance.getrandbits(32):08x}"
    joining = Stack(victims.settings.model_copy(update={"data_dir": folder}), roles=[role], program=victims.program)
    for _ in range(_JOINS):
        try:
            await joining.start()
            break
        except (StackError, TopicError, DatabaseError):  # it comes while another fault is not over
            await asyncio.sleep(2)
    else:
        return f"{role} cannot join"
    await asyncio.sleep(chance.uniform(1, 4))
    await joining.stop()
    return f"{role} joins and leaves"


async def cut_sessions(victims: Victims, chance: random.Random) -> str:
    """pg_terminate_backend on every session but ours."""
    try:
        connection = await connect(victims.cluster.direct_dsn)
        await connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = current_database() and pid <> pg_backend_pid()"
        )
        await connection.close()
    except Exception as error:
        if not is_transient(error):
            raise
    return "pg_terminate_backend"


async def crash_postgres(victims: Victims, chance: random.Random) -> str:
    """Immediate shutdown: as after a power cut, but for the disk."""
    return _signal(victims.cluster.postgres, signal.SIGQUIT)


async def kill_broker(victims: Victims, chance: random.Random) -> str:
    """kill -9 of the only broker, or of one of three."""
    return _signal(chance.choice(victims.cluster.brokers), signal.SIGKILL)


async def cut_at_commit(victims: Victims, chance: random.Random) -> str:
    """Cut connections just before the server hears of a COMMIT, and just before the client hears that it is done."""
    proxy = victims.cluster.postgres_proxy
    before = sum(proxy.cuts.values())
    for cut in chance.sample(["before COMMIT", "after COMMIT"] * _CUTS, 2 * _CUTS):
        proxy.plan(cut)
    await _until(lambda: not proxy.planned, _FIND_A_COMMIT_SECONDS)
    return f"{sum(proxy.cuts.values()) - before} connections cut at COMMIT"


async def slow_network(victims: Victims, chance: random.Random) -> str:
    """Every chunk is late, for a while."""
    proxy, name = _proxy(victims, chance)
    proxy.delay = chance.uniform(0.05, 0.2)
    await asyncio.sleep(chance.uniform(4, 6))
    proxy.delay, delay = 0.0, proxy.delay
    return f"{delay * 1000:.0f} ms to {name}"


async def stop_network(victims: Victims, chance: random.Random) -> str:
    """Nothing passes, past the session; then everything does, or every connection is reset."""
    proxy, name = _proxy(victims, chance)
    proxy.stopped = True
    await asyncio.sleep(victims.session_seconds + chance.uniform(1, 3))
    reset = chance.random() < 0.5
    if reset:
        proxy.cut_all()
    proxy.stopped = False
    return f"no network to {name}" + (", then resets" if reset else "")


async def silence_postgres(victims: Victims, chance: random.Random) -> str:
    """The database's host swallows every packet, for ever, and closes nothing: first of sessions at a COMMIT, then of
    all there are. For a while new sessions fare no better; from then on they pass."""
    proxy = victims.cluster.postgres_proxy
    before = sum(proxy.cuts.values())
    for cut in chance.sample(["silent before COMMIT", "silent after COMMIT"] * _SILENCES, 2 * _SILENCES):
        proxy.plan(cut)
    await _until(lambda: not proxy.planned, _FIND_A_COMMIT_SECONDS)
    proxy.is_silent = True
    silenced = await proxy.silence_all()
    await asyncio.sleep(_DEAF_SECONDS)
    proxy.is_silent = False
    return f"{sum(proxy.cuts.values()) - before} sessions silent at COMMIT, then {silenced} more"


async def fill_disk(victims: Victims, chance: random.Random) -> str:
    """The files of the trigger table cannot grow: the next write fails as on a full disk, and ends the worker."""
    worker = victims.stack.workers["triggers"]
    folder = victims.stack.settings.data_dir / "worker-triggers"
    sizes = [file.stat().st_size for file in folder.rglob("*.log")]  # RocksDB's write-ahead logs
    if worker.pid is None or not hasattr(resource, "prlimit"):
        return "no disk to fill"
    restarts = worker.restarts
    resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (max([1, *sizes]), resource.RLIM_INFINITY))
    ended = await _until(lambda: worker.restarts > restarts, 10)
    return "disk of the trigger table full" + ("" if ended else ", for the next write")


def _proxy(victims: Victims, chance: random.Random) -> tuple[Proxy, str]:
    kafka = victims.cluster.kafka_proxy
    if kafka and chance.random() < 0.5:
        return kafka, "Kafka"
    return victims.cluster.postgres_proxy, "Postgres"


async def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true in time."""
    try:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    except TimeoutError:
        return False
    return True


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        kill_worker, lose_worker, end_worker, freeze_worker, join_and_leave, cut_sessions, crash_postgres, kill_broker,
        cut_at_commit, slow_network, stop_network, silence_postgres, fill_disk,
    )
}  # fmt: skip


def choose(seed: int, count: int) -> list[str]:
    """The faults of a seed in their order: each kind once, then any; half of the rest kill or freeze workers."""
    chance = random.Random(f"faults {seed}")
    kinds = [name for name in FAULTS if name != "fill_disk" or sys.platform == "linux"]
    chosen = chance.sample(kinds, min(count, len(kinds)))
    often = ["kill_worker", "lose_worker", "freeze_worker", "cut_at_commit"]
    chosen += [chance.choice(chance.choice((often, kinds))) for _ in range(count - len(chosen))]
    return chosen
