"""Whether a run ended well, and runs one after another until one does not."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.simulation.postgres import Transaction as Tx
from tests.simulation.scheduler import Choices, shrink
from tests.simulation.world import World
from tidemark.oracle import (
    Actual,
    HistoryRow,
    Inputs,
    Key,
    Price,
    StateRow,
    Transaction,
    closing_date,
    compare,
)

Make = Callable[[Choices], World]


def judge(world: World, came_to_rest: bool) -> list[str]:
    """What is wrong; empty when the books are right and nothing is left to do."""
    if not came_to_rest:
        return ["it does not come to rest"]
    tables = world.database.tables
    expected = _inputs(world).books("FIFO")
    latest = max(tables["business_dates"], default=None)
    through = tables["securities"]
    tx = Tx(world.database)
    keys = [(portfolio, security) for security, portfolio in tables["position_state"]]
    history = {key: world.books.history(tx, (key[1], key[0])) for key in keys}
    actual = Actual(
        history,
        {key: list((tables["snapshots"].get((key[1], key[0])) or {}).values()) for key in keys},
        {
            # closed_on is not modelled
            (p, s): StateRow(state.epoch, state.watermark, state.status, through.get(s), closing_date(history[p, s]))
            for (s, p), state in tables["position_state"].items()
        },
    )
    found = [str(difference) for difference in compare(expected, actual, latest=latest)]
    found += [f"correction {seq}: not right" for seq, c in tables["corrections"].items() if not c.is_right]
    found += [f"job {id_}: {job.status}" for id_, job in tables["jobs"].items() if job.status != "COMPLETE"]
    found += [f"outbox: {event}" for event in tables["outbox"].values()]
    return found + _consumer(world, {key: rows for key, rows in actual.history.items() if rows})


def _consumer(world: World, live: dict[Key, Sequence[HistoryRow]]) -> list[str]:
    """One that keeps per key the highest epoch, and ignores ids that it has passed, has exactly the live history."""
    kept: dict[Key, tuple[int, list[str | None]]] = {}
    passed: dict[Key, int] = defaultdict(int)
    for record in world.broker.contents("transactions-processed"):
        number, event = record.value
        key = (event.key[1], event.key[0])
        if number <= passed[key]:
            continue
        passed[key] = number
        if event.sequence == 0 or key not in kept:
            kept[key] = (event.epoch, [])
        if event.sequence:
            kept[key][1].append(event.transaction_id)
    have = {key: ids for key, (_, ids) in kept.items() if ids}
    want = {key: [row.transaction_id for row in rows] for key, rows in live.items()}
    return [] if have == want else [f"a consumer has {have}, should have {want}"]


def _inputs(world: World) -> Inputs:
    inputs = Inputs()
    for topic, value in world.sent:
        if topic == "business-dates":
            inputs.business_dates.add(value)
        elif topic == "prices":
            known = inputs.prices.get((value.security_id, value.price_date))
            if known is None or value.revision >= known.revision:
                inputs.prices[value.security_id, value.price_date] = Price(
                    value.security_id, value.price_date, value.price, revision=value.revision
                )
        else:
            known_t = inputs.transactions.get(value.transaction_id)
            if known_t is None or value.revision > known_t.revision:
                inputs.transactions[value.transaction_id] = Transaction(
                    value.transaction_id,
                    value.portfolio_id,
                    value.security_id,
                    value.transaction_date,
                    value.transaction_type,
                    value.quantity,
                    value.gross_transaction_amount,
                    value.trade_fee,
                    value.cancelled,
                    revision=value.revision,
                )
    return inputs


@dataclass
class Search:
    """Runs tried, steps and seconds of CPU they took; the first run that failed, its choices as found and shrunk."""

    runs: int = 0
    steps: int = 0
    seconds: float = 0.0
    seed: int | None = None
    wrong: list[str] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    shrunk: list[int] = field(default_factory=list)


def run_once(make: Make, choices: Choices) -> tuple[World, list[str]]:
    """One run from its choices, judged. An exception of the engine's own code is a failure like any other."""
    world = make(choices)
    try:
        wrong = judge(world, world.run())
    except Exception as error:
        wrong = [f"{type(error).__name__}: {error}"]
    finally:
        world.scheduler.close()
    return world, wrong


def search(make: Make, first_seed: int, runs: int, seconds: float, *, shrinking: bool = True) -> Search:
    """Run after run, each from its seed, until one fails, so many are done or so much CPU time is spent."""
    found = Search()
    started = time.process_time()
    while found.runs < runs and (found.seconds < seconds or not found.runs):
        seed = first_seed + found.runs
        choices = Choices(seed)
        world, found.wrong = run_once(make, choices)
        found.runs += 1
        found.steps += world.scheduler.steps
        found.seconds = time.process_time() - started
        if found.wrong:
            found.seed, found.choices = seed, choices.taken
            if shrinking:
                found.shrunk = shrink(choices.taken, lambda numbers: bool(run_once(make, Choices(replay=numbers))[1]))
            break
    return found
