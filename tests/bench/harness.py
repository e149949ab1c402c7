"""What every benchmark shares: servers of its own, interleaved rounds of subject and baseline, medians, a table, JSON.

A benchmark is a module `tests/bench/bench_*.py` with `async def run(bench: Bench) -> None`. Figures are ratios against
a baseline measured in the same run, round by round in turn, since machines are small and noisy. No figure is asserted.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from deploy.local.kafka import KafkaServer
from deploy.local.ports import Ports
from deploy.local.postgres import PostgresServer
from sinks.database import migrate
from streams.settings import Settings
from streams.topics import ensure_topics
from tests.gate import open_gate
from tests.servers import serving
from tests.topology import settings_for

AS_BY_DEFAULT: dict[str, Any] = {
    name: Settings.model_fields[name].default
    for name in ("internal_partitions", "input_partitions", "session_timeout_seconds")
}
"""What tests make smaller: benchmarks run with what users have."""

Work = Callable[[], Awaitable[float]]
"""One round: returns the units of work done per second, or anything else of which more is better."""


@dataclass(frozen=True)
class Point:
    """Where a line stands among those of its series: at which size along the axis, or at which step."""

    series: str
    axis: str
    at: int


@dataclass(frozen=True)
class Result:
    """One line of the table. rounds: figure of each round; ratio: of the medians, wanted: what it should reach.

    less: less is better, of the ratio too; aim: the baseline is a figure aimed at, not one that was measured; point:
    of a line that is one of a series; bench: which benchmark measured it.
    """

    name: str
    unit: str
    rounds: list[float]
    baseline: str | None = None
    baseline_rounds: list[float] = field(default_factory=list)
    wanted: float | None = None
    note: str = ""
    less: bool = False
    aim: bool = False
    point: Point | None = None
    bench: str = ""

    @property
    def median(self) -> float:
        """The middle round."""
        return statistics.median(self.rounds)

    @property
    def ratio(self) -> float | None:
        """Median over the baseline's median."""
        return self.median / statistics.median(self.baseline_rounds) if self.baseline_rounds else None


class Bench:
    """Handed to every benchmark. quick: fewer rounds and smaller loads; scale: for benchmarks that multiply sizes."""

    def __init__(self, folder: Path, *, quick: bool, rounds: int, say: Callable[[str], None]) -> None:
        self.quick = quick
        self.rounds = rounds
        self.results: list[Result] = []
        self.seconds: dict[str, float] = {}
        self.say = say
        self.folder = folder
        self._ports = Ports(folder / "ports.json")
        self._servers = AsyncExitStack()
        self._postgres: PostgresServer | None = None
        self._kafka: KafkaServer | None = None
        self._running = ""

    @asynccontextmanager
    async def running(self, name: str) -> AsyncIterator[None]:
        """Within it lines belong to this benchmark; how long it takes is kept and told."""
        self._running, started = name, time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)
        self.say(f"{name}: done in {self.seconds[name]:.0f} s")

    def size(self, full: int, quick: int) -> int:
        """One figure of the load, by how much time there is."""
        return quick if self.quick else full

    async def compare(
        self,
        name: str,
        unit: str,
        subject: Work,
        baseline: tuple[str, Work] | None = None,
        *,
        wanted: float | None = None,
        rounds: int | None = None,
        note: str = "",
    ) -> Result:
        """Run subject and baseline in turn, `rounds` times, and keep the line."""
        works = [subject] if baseline is None else [baseline[1], subject]
        *others, figures = await self._in_turn(name, works, rounds or self.rounds)
        beside = (baseline[0], others[0]) if baseline else (None, [])
        return self.add(Result(name, unit, figures, *beside, wanted, note))

    async def compare_with_each(
        self, name: str, unit: str, subject: Work, baselines: Sequence[tuple[str, Work, float]]
    ) -> None:
        """Run all baselines, each with what is wanted beside it, and the subject in turn; keep a line for each."""
        works = [*(work for _, work, _ in baselines), subject]
        *others, figures = await self._in_turn(name, works, self.rounds)
        for (baseline, _, wanted), rounds in zip(baselines, others, strict=True):
            self.add(Result(name, unit, figures, baseline, rounds, wanted))

    async def _in_turn(self, name: str, works: Sequence[Work], rounds: int) -> list[list[float]]:
        figures: list[list[float]] = [[] for _ in works]
        for number in range(rounds):
            self.say(f"{name}: round {number + 1} of {rounds}")
            for work, kept in zip(works, figures, strict=True):
                kept.append(await work())
        return figures

    def add(self, result: Result) -> Result:
        """Keep a line that was measured in some other way."""
        kept = replace(result, bench=self._running)
        self.results.append(kept)
        return kept

    @asynccontextmanager
    async def database(self, *, migrated: bool = True) -> AsyncIterator[str]:
        """The address of a fresh database, dropped afterwards."""
        server = await self.postgres()
        name = f"bench_{uuid.uuid4().hex[:12]}"
        dsn = await server.create_database(name)
        try:
            if migrated:
                await migrate(dsn)
                await open_gate(dsn)
            yield dsn
        finally:
            await server.drop_database(name)

    async def postgres(self) -> PostgresServer:
        """The run's Postgres, started at the first call."""
        if self._postgres is None:
            server = PostgresServer(self.folder / "postgres", self.folder / "postgres.log", self._ports)
            await self._servers.enter_async_context(serving("postgres", server))
            self._postgres = server
        return self._postgres

    async def kafka(self) -> str:
        """The address of the run's Kafka, kafka://host:port, started at the first call."""
        if self._kafka is None:
            server = KafkaServer(self.folder / "kafka", self.folder / "kafka.log", self._ports)
            await self._servers.enter_async_context(serving("kafka", server))
            self._kafka = server
        return self._kafka.url

    async def settings(self, dsn: str, **changes: Any) -> Settings:
        """For this database and the run's Kafka, under a prefix of their own; the topics are there."""
        settings = settings_for(await self.kafka(), dsn, self.folder, **AS_BY_DEFAULT | changes)
        await ensure_topics(settings)
        return settings

    async def close(self) -> None:
        """End the servers."""
        await self._servers.aclose()


@asynccontextmanager
async def open_bench(*, quick: bool, rounds: int, say: Callable[[str], None]) -> AsyncIterator[Bench]:
    """A bench with a folder of its own, gone afterwards."""
    folder = await asyncio.to_thread(_new_folder)
    bench = Bench(folder, quick=quick, rounds=rounds, say=say)
    try:
        yield bench
    finally:
        await bench.close()
        shutil.rmtree(folder, ignore_errors=True)


def _new_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tidemark-bench-"))
    folder.chmod(0o711)  # started by root, Postgres runs as a user of its own
    return folder


async def timed(work: Awaitable[Any]) -> float:
    """Seconds that the work takes."""
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


def percentile(percent: int, values: Sequence[float]) -> float:
    """The value that so many per cent of the others are below; of too few values the largest."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]


def as_json(bench: Bench, begun: dict[str, Any]) -> dict[str, Any]:
    """Everything measured: every round of every line, how long each benchmark took. begun: when, and on what."""
    return {
        **begun,
        "quick": bench.quick,
        "rounds": bench.rounds,
        "seconds": bench.seconds,
        "results": [{**asdict(result), "median": result.median, "ratio": result.ratio} for result in bench.results],
    }
