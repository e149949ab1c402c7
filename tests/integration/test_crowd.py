"""Thousands of securities due at once: looking for what to do next must not cost more than doing it."""

from __future__ import annotations

from datetime import date

import asyncpg
import pytest

from sinks import claims
from sinks.database import Pool
from sinks.valuation import Pass, Valuation
from tests.herd import load

_CROWD = [f"S{number:05}" for number in range(claims.SECURITIES_AT_ONCE + 200)]
_AT_ONCE = 100


class Counted(claims.Claims):
    """Counts how often it looks for what is due."""

    looked_up = 0

    async def look_up(self, connection: asyncpg.Connection, latest: date) -> None:
        self.looked_up += 1
        await super().look_up(connection, latest)


class Counting(Valuation):
    """A valuation whose looks are counted."""

    def __init__(self, pool: Pool, keys: int) -> None:
        super().__init__(pool, keys)
        self.claims: Counted = Counted(keys)

    @property
    def looked_up(self) -> int:
        """How often so far."""
        return self.claims.looked_up


async def due(pool: Pool, securities: list[str]) -> None:
    """One key of each security, and a date that has just been closed."""
    await load(pool, securities, 1, dates=2)
    await pool.execute("insert into business_dates values ('2025-01-03')")


async def test_a_crowd_is_looked_up_once(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "KEPT_FOR", 1e9)
    await due(pool, _CROWD)
    valued = Counting(pool, _AT_ONCE)
    for number in range(len(_CROWD) // _AT_ONCE):
        assert (await valued.pass_once()).keys == _AT_ONCE, number
    assert valued.looked_up == 1
    assert (await valued.pass_once()).keys == 0
    assert valued.looked_up == 2
    assert await pool.fetchval("select count(*) from dirty_keys") == 0


async def test_a_crowd_is_looked_up_again_in_time(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "KEPT_FOR", 0.0)
    await due(pool, _CROWD)
    valued = Counting(pool, _AT_ONCE)
    assert [(await valued.pass_once()).keys for _ in range(3)] == [_AT_ONCE] * 3
    assert valued.looked_up == 3


async def test_what_comes_to_a_few_is_seen_at_once(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a crowd is kept: a correction with priority need not wait until ten securities are done."""
    monkeypatch.setattr(claims, "KEPT_FOR", 1e9)
    await due(pool, _CROWD[:10])
    valued = Counting(pool, 1)
    assert [(await valued.pass_once()).keys for _ in range(3)] == [1] * 3
    assert valued.looked_up == 3


async def test_a_worker_whose_crowd_was_valued_by_others_looks_again(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "KEPT_FOR", 1e9)
    await due(pool, _CROWD)
    late, other = Counting(pool, _AT_ONCE), Valuation(pool, 2 * len(_CROWD))
    assert (await late.pass_once()).keys == _AT_ONCE
    while await other.pass_once() != Pass():
        pass
    await load(pool, ["NEW"], 1, dates=1)
    await pool.execute("update position_state set watermark_date = '2025-01-01' where security_id = 'NEW'")
    await pool.execute("update securities set valued_through = '2025-01-01' where security_id = 'NEW'")
    assert (await late.pass_once()).keys == 1
    assert late.looked_up == 2
