"""What roles hold at most, by the peak of a real process: it neither grows with histories nor with what waits.

`make memory` runs it with ROWS=1000, for histories ten times as long. Bounds and figures are those of
docs/operating.md, Memory.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from sinks.database import connect_pool
from streams.settings import load_named
from streams.topics import PROCESSED, ensure_topics
from tests.reading import read_all

ROOT = Path(__file__).parents[2]
KEYS, RECORDS = 2_000, 5_000
ROWS = int(os.environ.get("ROWS", "100"))
"""Of history, for each of the keys."""

MOST_MIB = {"intake": 256, "books": 128}

_FILL = """
insert into position_state (security_id, portfolio_id, watermark_date)
    select 'S', 'P' || lpad(k::text, 6, '0'), '2019-12-31' from generate_series(0, $1::int - 1) k
"""
_FILL_TRANSACTIONS = """
insert into transactions
    select 'P' || k || 'T' || n, 'P' || lpad(k::text, 6, '0'), 'S', '2020-01-01Z'::timestamptz + n * interval '1 min',
           'BUY', 1, 10, 10, 0, 'USD', 0, false
    from generate_series(0, $1::int - 1) k, generate_series(1, $2::int) n
"""
_FILL_HISTORY = """
insert into position_history (security_id, portfolio_id, epoch, sequence, transaction_id, transaction_date,
                              position_date, quantity, cost_basis, realized_gain_loss, head_sequence, head_quantity,
                              head_cost, lot_quantity, lot_cost)
    select security_id, portfolio_id, 0, n, transaction_id, transaction_date, transaction_date::date, n, 10 * n, 0,
           1, 1, 10, 1, 10
    from (select *, row_number() over (partition by portfolio_id order by transaction_date) as n from transactions) t
"""


async def run(**task: Any) -> dict[str, Any]:
    """The work in a process of its own; fails with what it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.memory.work", cwd=ROOT, stdin=-1, stdout=-1, stderr=-1
    )
    told, errors = await process.communicate(json.dumps(task).encode())
    assert process.returncode == 0, errors.decode()[-2000:]
    found: dict[str, Any] = json.loads(told)
    print(f"{task['work']}: {found['before']:.0f} MiB before, {found['peak']:.0f} MiB at its peak; {found}")
    return found


@pytest.fixture
async def filled(database: str) -> str:
    """Books of KEYS positions with ROWS rows of history each."""
    async with await connect_pool(database) as pool:
        await pool.execute(_FILL, KEYS)
        await pool.execute(_FILL_TRANSACTIONS, KEYS, ROWS)
        await pool.execute(_FILL_HISTORY)
        await pool.execute("analyze")
    return database


@pytest.mark.timeout(3_600)
async def test_a_restatement_and_its_replays_take_no_more_memory_than_is_stated(
    filled: str, kafka: str, folder: Path
) -> None:
    """5,000 late records on 2,000 keys in one transaction, and the relay with the 2,000 replays that follow from it."""
    booked = await run(work="restate", dsn=filled, keys=KEYS, records=RECORDS, replay_rows=0)
    assert (booked["rebuilt"], booked["replayed"]) == (KEYS, KEYS * ROWS + RECORDS)
    prefix = f"m{uuid.uuid4().hex[:8]}-"
    settings = load_named(
        broker_url=kafka, database_url=filled, data_dir=folder / prefix, topic_prefix=prefix, internal_partitions=2
    )
    await ensure_topics(settings)
    relayed = await run(work="catch_up", dsn=filled, broker=kafka, prefix=prefix, folder=str(folder / prefix))
    published, _ = await read_all(settings, PROCESSED)
    assert len(published) == KEYS * (ROWS + 1) + RECORDS  # a marker for each key
    assert booked["peak"] < MOST_MIB["intake"]
    assert relayed["peak"] < MOST_MIB["books"]


def test_the_stated_memory_is_within_what_the_manifests_give() -> None:
    manifest = YAML(typ="safe").load(ROOT / "deploy/kubernetes/base/patches/pod.yaml")
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    limit = container["resources"]["limits"]["memory"]
    assert limit.endswith("Gi")
    assert max(MOST_MIB.values()) < int(limit.removesuffix("Gi")) * 1024
