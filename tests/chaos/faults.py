"""The faults: each is bounded, acts on processes that the run has started, and leaves healing to the supervisors."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from deploy.local.part import Part
from deploy.local.stack import Stack
from sinks.database import connect, is_transient


@dataclass(frozen=True)
class Victims:
    """What a fault may hit."""

    stack: Stack
    spare: Stack
    kafka: Part
    postgres: Part
    dsn: str
    session_seconds: float

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
    """kill -9."""
    return _signal(victims.worker(chance), signal.SIGKILL)


async def end_worker(victims: Victims, chance: random.Random) -> str:
    """A clean stop in the middle of work; the supervisor starts it again, so the group changes twice."""
    return _signal(victims.worker(chance), signal.SIGTERM)


async def freeze_worker(victims: Victims, chance: random.Random) -> str:
    """A zombie: stopped past its session, its partitions taken over, then awake with work in hand."""
    worker = victims.worker(chance, "intake", "intake", "resets")
    pid = worker.pid
    if pid is None:
        return "nobody to freeze"
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(victims.session_seconds + chance.uniform(1, 3))
    finally:
        os.kill(pid, signal.SIGCONT)
    return f"freeze {worker.name}"


async def cut_sessions(victims: Victims, chance: random.Random) -> str:
    """pg_terminate_backend on every session of the workers."""
    try:
        connection = await connect(victims.dsn)
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
    return _signal(victims.postgres, signal.SIGQUIT)


async def kill_broker(victims: Victims, chance: random.Random) -> str:
    """kill -9 of the only broker."""
    return _signal(victims.kafka, signal.SIGKILL)


FAULTS: dict[Fault, int] = {
    kill_worker: 4,
    end_worker: 2,
    freeze_worker: 3,
    cut_sessions: 3,
    crash_postgres: 2,
    kill_broker: 1,
}
