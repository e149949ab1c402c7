"""The audit finds exactly what was damaged by hand, on a live database too, and its repair puts it right."""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import AsyncIterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sinks import actions, audit_progress
from streams import metrics
from streams.auditor import audit_continuously
from streams.settings import load_named
from tests import scenarios
from tests.engine import Engine
from tidemark.audit import Scope, audit_books, repair
from tidemark.audit import books as audit_module
from tidemark.audit.background import Auditor
from tidemark.main import main
from tidemark.oracle import Difference

L = date(2025, 1, 8)
SNAPSHOT = "portfolio P1, security A, snapshot 2025-01-03"


def dates(*days: int) -> list[dict[str, Any]]:
    return [{"business_date": f"2025-01-{day:02}"} for day in days]


def price(security: str, day: int, value: object) -> dict[str, Any]:
    return {"security_id": security, "price_date": f"2025-01-{day:02}", "price": value}


def trade(id_: str, kind: str, quantity: int, day: int, portfolio: str, security: str = "A") -> dict[str, Any]:
    return {
        "transaction_id": id_, "portfolio_id": portfolio, "security_id": security,
        "transaction_date": f"2025-01-{day:02}T10:00:00Z", "transaction_type": kind, "quantity": quantity, "price": 10,
        "gross_transaction_amount": quantity * 10,
    }  # fmt: skip


@pytest.fixture
async def engine(database: str) -> AsyncIterator[Engine]:
    """Two securities, three portfolios; P3 has sold all; valued up to L."""
    engine = await Engine.on(database)
    await engine.take("prices", [price("A", 2, 100), price("A", 6, "110.5"), price("B", 3, 7)])
    await engine.take(
        "transactions",
        [
            *(trade(f"{p}-{s}", "BUY", 10, 2, p, s) for p in ("P1", "P2", "P3") for s in ("A", "B")),
            trade("P3-out", "SELL", 10, 3, "P3"),
            trade("P1-more", "BUY", 5, 6, "P1"),
        ],
    )
    await engine.take("business-dates", dates(2, 3, 6, 7, 8))
    await engine.drain()
    yield engine
    await engine.pool.close()


async def found(database: str, **more: Any) -> list[str]:
    return [str(difference) for difference in (await audit_books(database, "FIFO", **more)).differences]


_KEY = "portfolio_id = 'P1' and security_id = 'A'"
_CLOSED = "portfolio_id = 'P3' and security_id = 'A'"
_DAMAGES = {
    "a changed value": (
        f"update daily_position_snapshots set market_value = market_value + 0.0000000001 "
        f"where {_KEY} and valuation_date = '2025-01-03'",
        [f"{SNAPSHOT}: market_value is 1000.0000000001, should be 1000.0000000000"],
    ),
    "a missing row": (
        f"delete from daily_position_snapshots where {_KEY} and valuation_date = '2025-01-03'",
        [f"{SNAPSHOT}: is missing"],
    ),
    "an extra row of a closed position": (
        """
        insert into daily_position_snapshots select security_id, portfolio_id, '2025-01-07', epoch, quantity,
            cost_basis, price, price_date, market_value, unrealized_gain_loss, valuation_status
        from daily_position_snapshots
        where portfolio_id = 'P3' and security_id = 'A' and valuation_date = '2025-01-03'
        """,
        ["portfolio P3, security A, snapshot 2025-01-07: is there, should not be"],
    ),
    "an extra row of a key that never was": (
        """
        insert into daily_position_snapshots select 'Z', 'NOBODY', valuation_date, epoch, quantity, cost_basis,
            price, price_date, market_value, unrealized_gain_loss, valuation_status
        from daily_position_snapshots
        where portfolio_id = 'P1' and security_id = 'A' and valuation_date = '2025-01-03'
        """,
        ["portfolio NOBODY, security Z, snapshot 2025-01-03: is there, should not be"],
    ),
    "a watermark too low, of which nobody was told": (
        f"update position_state set watermark_date = '2025-01-03' where {_KEY}",
        [
            "portfolio P1, security A, state: watermark is 2025-01-03, "
            "but the security counts as valued through 2025-01-08"
        ],
    ),
    "a watermark too high": (
        f"update position_state set watermark_date = '2025-01-10' where {_KEY}",
        ["portfolio P1, security A, state: watermark is 2025-01-10, beyond the latest closed date 2025-01-08"],
    ),
    "a cost in the history": (
        f"update position_history set cost_basis = 101 where {_KEY} and sequence = 1 and superseded_epoch is null",
        ["portfolio P1, security A, history 1: cost_basis is 101, should be 100.0000000000"],
    ),
    "a row of history gone": (
        f"delete from position_history where {_KEY} and sequence = 2 and superseded_epoch is null",
        ["portfolio P1, security A, history 2: is missing"],
    ),
    "a row of an epoch that is not reached": (
        f"update position_history set epoch = 90 where {_KEY} and sequence = 2 and superseded_epoch is null",
        ["portfolio P1, security A, state: epoch is {epoch}, but a row has epoch 90"],
    ),
    "a state gone": (
        f"delete from position_state where {_KEY}",
        ["portfolio P1, security A, state: is missing"],
    ),
    "a key that holds something marked as closed": (
        f"update position_state set closed_on = '2025-01-03' where {_KEY}",
        ["portfolio P1, security A, state: closed_on is 2025-01-03, should be null"],
    ),
    "a closed key marked as open": (
        f"update position_state set closed_on = null where {_CLOSED}",
        ["portfolio P3, security A, state: closed_on is null, should be 2025-01-03"],
    ),
    "a key marked as closed too early": (
        f"update position_state set closed_on = '2025-01-01' where {_CLOSED}",
        ["portfolio P3, security A, state: closed_on is 2025-01-01, should be 2025-01-03"],
    ),
    "a closed key's watermark too high": (
        f"update position_state set watermark_date = '2025-01-10' where {_CLOSED}",
        ["portfolio P3, security A, state: watermark is 2025-01-10, beyond the latest closed date 2025-01-08"],
    ),
    "a status left behind": (
        f"update position_state set status = 'REPROCESSING' where {_KEY}",
        ["portfolio P1, security A, state: status is REPROCESSING, should be CURRENT"],
    ),
}


async def test_what_was_damaged_is_reported_exactly_and_repaired(engine: Engine, database: str) -> None:
    assert await found(database) == []
    for damage, (sql, expected) in _DAMAGES.items():
        epoch = await engine.pool.fetchval(f"select epoch from position_state where {_KEY}")
        assert (await engine.pool.execute(sql)).endswith(" 1"), damage
        planner = repair.Planner()
        result = await audit_books(database, "FIFO", on_difference=planner.add)
        assert [str(difference) for difference in result.differences] == [
            line.format(epoch=epoch) for line in expected
        ], damage
        await repair.carry_out(database, "Ada", "FIFO", planner.plan())
        await engine.drain()
        after = await audit_books(database, "FIFO")
        assert ([str(difference) for difference in after.differences], after.waiting) == ([], []), damage
        assert await engine.pool.fetchval("select count(*) from corrections where right_at is null") == 0, damage


async def test_a_repair_goes_through_the_normal_path(engine: Engine, database: str) -> None:
    """A trigger and a job for wrong snapshots; a new epoch and a replay for a wrong history."""
    await engine.pool.execute("update daily_position_snapshots set price = 1 where security_id = 'B'")
    await engine.pool.execute(f"update position_history set quantity = 1 where {_KEY}")
    planner = repair.Planner()
    await audit_books(database, "FIFO", on_difference=planner.add)
    plan = planner.plan()
    assert (plan.securities, plan.keys) == ({"B": date(2025, 1, 2)}, {("P1", "A")})
    await repair.carry_out(database, "Ada", "FIFO", plan)
    async with engine.pool.acquire() as connection:
        written_down = [(done["actor"], done["action"], done["arguments"]) for done in await actions.latest(connection)]
    assert written_down == [
        ("Ada", "repair", {"securities": [{"security_id": "B", "from_date": "2025-01-02"}]}),
        ("Ada", "repair", {"keys": [{"security_id": "A", "portfolio_id": "P1"}]}),
    ]
    engine.published.clear()
    await engine.drain()
    triggers = [event for topic, event in engine.published if topic == "reprocessing-triggers"]
    assert [(t["security_id"], t["earliest_impacted_date"], t["reason"]) for t in triggers] == [
        ("B", "2025-01-02", "audit")
    ]
    replayed = [event for topic, event in engine.published if topic == "transactions-processed"]
    assert [(event["sequence"], event["epoch"]) for event in replayed] == [(0, 1), (1, 1), (2, 1)]
    assert await found(database) == []


async def test_only_what_is_visibly_dirty_is_left_out(engine: Engine, database: str) -> None:
    """A late price that no job has reached yet: the dates before it are compared, those from it on are not."""
    await engine.take("prices", [price("A", 6, 120)])
    result = await audit_books(database, "FIFO")
    assert (result.differences, result.waiting) == ([], [("P1", "A"), ("P2", "A")])
    everything = await engine.pool.fetchval("select count(*) from daily_position_snapshots")
    assert everything - result.snapshots == 6
    await engine.pool.execute("update daily_position_snapshots set price = 1 where valuation_date >= '2025-01-03'")
    damaged = [line for line in await found(database) if "security A" in line]
    assert damaged == [
        "portfolio P1, security A, snapshot 2025-01-03: price is 1, should be 100",
        "portfolio P2, security A, snapshot 2025-01-03: price is 1, should be 100",
        "portfolio P3, security A, snapshot 2025-01-03: price is 1, should be 100",
    ]


async def test_one_moment_while_the_books_move(engine: Engine, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two pieces a late price, its reset and its valuation happen: the audit does not see them."""
    monkeypatch.setattr(audit_module, "ROWS_AT_ONCE", 1)
    pieces = 0
    audit_piece = audit_module.audit_piece

    async def audit_and_move(*arguments: Any) -> Any:
        nonlocal pieces
        pieces += 1
        if pieces == 2:
            await engine.take("prices", [price("B", 3, 8)])
            await engine.drain()
        return await audit_piece(*arguments)

    monkeypatch.setattr(audit_module, "audit_piece", audit_and_move)
    result = await audit_books(database, "FIFO")
    assert (result.differences, result.waiting, pieces) == ([], [], 7)  # the last: what may come after the last key
    assert result.keys == 6


@pytest.mark.parametrize(("rows", "processes"), [(1, 1), (40, 2)])
async def test_pieces_and_processes_change_nothing(
    engine: Engine, database: str, monkeypatch: pytest.MonkeyPatch, rows: int, processes: int
) -> None:
    monkeypatch.setattr(audit_module, "ROWS_AT_ONCE", rows)
    events = scenarios.generate(5, events=600)
    for topic in ("prices", "transactions", "business-dates"):
        await engine.take(topic, [record for t, record in events if t == topic])
    await engine.drain()
    await engine.pool.execute(
        "update daily_position_snapshots set cost_basis = cost_basis + 1 where portfolio_id = 'P1'"
    )
    result = await audit_books(database, "FIFO", processes=processes)
    differing = await engine.pool.fetchval("select count(*) from daily_position_snapshots where portfolio_id = 'P1'")
    assert {difference.column for difference in result.differences} == {"cost_basis"}
    assert result.difference_count == differing > 5
    assert result.snapshots == await engine.pool.fetchval("select count(*) from daily_position_snapshots")
    assert result.keys == await engine.pool.fetchval("select count(*) from position_state")


@pytest.mark.parametrize(
    ("scope", "keys"),
    [
        (Scope(portfolio_id="P1"), [("P1", "A"), ("P1", "B")]),
        (Scope(security_id="B"), [("P1", "B"), ("P2", "B"), ("P3", "B")]),
        (Scope(key=("P2", "A")), [("P2", "A")]),
        (Scope(sample_percent=100), [(p, s) for p in ("P1", "P2", "P3") for s in ("A", "B")]),
    ],
)
async def test_a_part_of_the_books(engine: Engine, database: str, scope: Scope, keys: Sequence[Any]) -> None:
    await engine.pool.execute("update position_state set watermark_date = '2025-02-01'")
    result = await audit_books(database, "FIFO", scope=scope)
    assert [difference.key for difference in result.differences] == sorted(keys)
    assert result.keys == len(keys)


async def test_a_sample_is_of_the_size_asked_for(engine: Engine, database: str) -> None:
    assert (await audit_books(database, "FIFO", scope=Scope(sample=4))).keys == 4
    assert (await audit_books(database, "FIFO", scope=Scope(sample_percent=50))).keys == 3


async def test_market_values_beyond_thirty_eight_digits_are_exact(engine: Engine, database: str) -> None:
    large = {"quantity": "999999999999999999.9999999999", "gross_transaction_amount": "999999999999999999.9999999999"}
    await engine.take("prices", [price("HUGE", 2, "999999999999999999.9999999999")])
    await engine.take("transactions", [trade("huge", "BUY", 1, 2, "P1", "HUGE") | large])
    await engine.drain()
    assert await found(database) == []
    await engine.pool.execute(
        "update daily_position_snapshots set market_value = market_value + 0.0000000001 "
        "where security_id = 'HUGE' and valuation_date = '2025-01-08'"
    )
    (line,) = await found(database)
    assert "market_value is 999999999999999999999999999800000000.0000000001" in line


def run(database: str, *arguments: str) -> Any:
    environment = {"TIDEMARK_DATABASE_URL": database, "TIDEMARK_BROKER_URL": "kafka://127.0.0.1:1"}
    return CliRunner().invoke(main, ["audit", "--processes", "1", *arguments], env=environment)


async def test_the_command(engine: Engine, database: str, tmp_path: Path) -> None:
    async def audit(*arguments: str) -> Any:
        return await asyncio.to_thread(run, database, *arguments)

    right = await audit()
    assert right.exit_code == 0
    assert "27 snapshots and 8 history rows of 6 keys agree" in right.stdout
    await engine.pool.execute("delete from daily_position_snapshots where security_id = 'B' and portfolio_id = 'P2'")
    wrong = await audit("--export", str(tmp_path / "found.csv"))
    assert wrong.exit_code == 1
    assert wrong.stdout.splitlines()[-1] == "5 differences in 27 snapshots and 8 history rows of 6 keys"
    with (tmp_path / "found.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["place"] for row in rows] == [f"2025-01-{day:02}" for day in (2, 3, 6, 7, 8)]
    found = json.loads((await audit("--json", "--security", "B", "--export", str(tmp_path / "found.jsonl"))).stdout)
    assert (found["agrees"], found["difference_count"], len(found["differences"])) == (False, 5, 5)
    lines = (tmp_path / "found.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == found["differences"][0]
    assert (await audit("--portfolio", "P1")).exit_code == 0
    repaired = await audit("--repair")
    assert (repaired.exit_code, "queued to be put right" in repaired.stderr) == (1, True)
    await engine.drain()
    assert (await audit()).exit_code == 0
    for arguments, message in [
        (("--portfolio", "P9"), "no such position"),
        (("--sample", "0"), "a whole number from 1 to"),
        (("--export", "found.xml"), "must end in .csv or .jsonl"),
        (("--key", "P1", "A", "--security", "A"), "exclude each other"),
        (("--export", str(tmp_path / "nowhere" / "found.csv")), "No such file"),
    ]:
        refused = await audit(*arguments)
        assert refused.exit_code in (1, 2)
        assert message in refused.stderr


async def test_the_auditor_goes_on_where_it_was_and_tells_once(
    engine: Engine, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "ROWS_AT_ONCE", 12)  # two keys in a piece
    await engine.pool.execute(f"update daily_position_snapshots set price = 1 where {_KEY} and valuation_date = $1", L)
    told: list[Difference] = []
    rests: list[float] = []

    async def rest(seconds: float) -> None:
        rests.append(seconds)

    ended = []
    for _ in range(2):  # the second as after a restart
        auditor = Auditor(database, "FIFO", 0.25, told.append, rest)
        async with audit_progress.leadership(database) as progress, audit_progress.leadership(database) as other:
            assert other is None
            assert progress is not None
            ended += [await auditor.step(progress) for _ in range(2)]
    assert ended == [False, False, False, True]
    assert [difference.key for difference in told] == [("P1", "A")]
    assert all(seconds > 0 for seconds in rests)
    async with engine.pool.acquire() as connection:
        assert await audit_progress.full_pass_age(connection) < 60
    async with audit_progress.leadership(database) as progress:
        assert progress is not None
        for _ in range(8):
            await auditor.step(progress)
    assert [difference.key for difference in told] == [("P1", "A")] * 2  # by either process, once


async def test_the_worker_counts_and_logs_what_its_auditor_finds(
    engine: Engine, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    await engine.pool.execute(f"delete from daily_position_snapshots where {_KEY}")
    settings = load_named(database_url=database, broker_url="kafka://127.0.0.1:1", audit_share=1)
    before = metrics.AUDIT_DIFFERENCES._value.get()
    auditing = asyncio.create_task(audit_continuously(settings, lambda: False))
    try:
        async with asyncio.timeout(120):
            while await engine.pool.fetchval("select full_pass_at from audit_progress") is None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            while metrics.AUDIT_DIFFERENCES._value.get() < before + 5:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    finally:
        auditing.cancel()
        await asyncio.gather(auditing, return_exceptions=True)
    assert metrics.AUDIT_DIFFERENCES._value.get() == before + 5
    assert "portfolio P1, security A, snapshot 2025-01-08: is missing" in caplog.text
    async with asyncio.timeout(120):  # its process is gone, and its leadership with it
        while True:
            async with audit_progress.leadership(database) as progress:
                if progress:
                    break
            await asyncio.sleep(0.05)
