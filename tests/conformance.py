"""What the models have to have in common with the original: the same scripts, run against both."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

from tests import scenarios
from tests.engine import Engine
from tests.simulation.engine import ModelEngine

_EPOCHS = "select portfolio_id, security_id, epoch, watermark_date, status from position_state"
_HISTORY = """
select portfolio_id, security_id, transaction_id, position_date, sequence, quantity, cost_basis, realized_gain_loss
from position_history where superseded_epoch is null order by security_id, portfolio_id, sequence
"""
_SNAPSHOTS = """
select portfolio_id, security_id, valuation_date, quantity, cost_basis, price, price_date, market_value,
       unrealized_gain_loss, valuation_status
from daily_position_snapshots order by security_id, portfolio_id, valuation_date
"""
_CORRECTIONS = """
select seq, security_id, earliest_date, reason, reset_at is not null, right_at is not null from corrections order by seq
"""


async def state(engine: Engine) -> dict[str, Any]:
    """As ModelEngine.state: watermarks and statuses of positions that are open only, since a closed one may wait."""
    history = _by_key(await engine.pool.fetch(_HISTORY))
    states = await engine.pool.fetch(_EPOCHS)
    return {
        "epochs": {(row[0], row[1]): row[2] for row in states},
        "watermarks": {
            (row[0], row[1]): (row[3], row[4])
            for row in states
            if (rows := history.get((row[0], row[1]))) and rows[-1][3] != 0
        },
        "history": history,
        "snapshots": _by_key(await engine.pool.fetch(_SNAPSHOTS)),
        "corrections": [tuple(row) for row in await engine.pool.fetch(_CORRECTIONS)],
    }


def _by_key(rows: Any) -> dict[tuple[str, str], list[tuple[Any, ...]]]:
    found: dict[tuple[str, str], list[tuple[Any, ...]]] = defaultdict(list)
    for row in rows:
        found[row[0], row[1]].append(tuple(row)[2:])
    return dict(found)


async def run_both(engine: Engine, model: ModelEngine, seed: int, events: int) -> int:
    """The same random steps on both; they are alike after each. Returns how many corrections there were."""
    chance = random.Random(seed)
    arriving = scenarios.generate(seed, events=events)
    while arriving:
        topic, size = arriving[0][0], chance.choice([1, 5, 20])
        batch = [record for t, record in arriving[:size] if t == topic]
        arriving = [event for event in arriving[:size] if event[0] != topic] + arriving[size:]
        await engine.take(topic, batch)
        await model.take(topic, batch)
        for _ in range(2):
            await _step_both(engine, model, chance)
        modelled, original = await model.state(), await state(engine)
        for part, found in modelled.items():
            assert found == original[part], f"{part}, seed {seed}, {len(arriving)} records left"
    corrections: int = await engine.pool.fetchval("select count(*) from corrections")
    return corrections


async def _step_both(engine: Engine, model: ModelEngine, chance: random.Random) -> None:
    match chance.randrange(4):
        case 0:
            await engine.relay()
            await model.relay()
        case 1:
            await engine.open_jobs()
            await model.open_jobs()
        case 2 if engine.running:
            scan = chance.choice([1, 2, 5])
            await engine.reset_chunk(scan)
            await model.reset_chunk(scan)
        case _:
            await engine.value()
            await model.value()
