"""The cluster-wide limit on watermark resets: a generic cell rate algorithm in one row (design, Watermark sink).

A worker that must wait reserves nothing: it asks again, so that a new rate or a pause is in force everywhere within
the longest wait. What was reserved and not used is given back, so the rate is that of keys reset.
"""

from __future__ import annotations

from dataclasses import dataclass

from sinks.database import Connection
from sinks.ranges import RESET_RATE

_LONGEST_SECONDS = 0.1  # of keys, in one reservation: what makes the rate smooth
_LONGEST_WAIT = 0.25  # how late a new rate may be noticed
_SLACK = 0.1  # what a late wake-up may catch up with
_STALE_SECONDS = 30  # an adapted rate that nobody tends any more does not count

_RATE = f"""
case when adapted_rows_per_second is null or adapted_at < clock_timestamp() - interval '{_STALE_SECONDS} seconds'
     then rows_per_second else least(rows_per_second, adapted_rows_per_second) end
"""

_MOST = f"floor(greatest(1, ({_RATE}) * {_LONGEST_SECONDS}))"

# Losing a reservation in a crash is harmless: it need not wait for the disk.
_FAST = "with fast as materialized (select set_config('synchronous_commit', 'off', true))"

# The row is locked before it is changed, so that the time it held is known; what is computed is computed from the row.
_RESERVE = f"""
{_FAST}, held as materialized (select tat as before from reset_limit for no key update)
update reset_limit set tat = case
    when paused or tat > clock_timestamp() then tat
    else greatest(tat, clock_timestamp() - interval '{_SLACK} seconds')
         + make_interval(secs => least($1, {_MOST}) / ({_RATE})) end
from fast, held
returning (case when tat > before then least($1, {_MOST}) else 0 end)::int as rows, ({_MOST})::int as most,
    (case when paused then {_LONGEST_WAIT}
     else least({_LONGEST_WAIT}, greatest(0.001, extract(epoch from before - clock_timestamp()))) end)::float8 as wait
"""

_GIVE_BACK = f"""
{_FAST}
update reset_limit set tat = tat - make_interval(secs => $1 / ({_RATE})) from fast
"""

# How long the oldest live transaction has been running, its waits for locks included.
_PRESSURE = """
select coalesce(max(extract(epoch from clock_timestamp() - xact_start)), 0)::float8
from pg_stat_activity
where datname = current_database() and state = 'active' and application_name = 'tidemark-intake'
"""

_TAKE_TURN = f"""
select {_RATE} as rate, rows_per_second as ceiling from reset_limit
where not paused and adapted_at <= clock_timestamp() - make_interval(secs => $1)
for no key update skip locked
"""

_ADAPT = "update reset_limit set adapted_rows_per_second = $1, adapted_at = clock_timestamp()"

_STEP_UP = 0.05  # of the ceiling, each time
_BACK_OFF = 0.5
_FLOOR = 0.01  # of the ceiling


@dataclass(frozen=True, slots=True)
class Reservation:
    """rows granted now (0: ask again after wait_seconds); most: what one reservation can give at the present rate."""

    rows: int
    most: int
    wait_seconds: float


async def set_first_value(connection: Connection, rows_per_second: float) -> None:
    """The setting counts only where no rate is stored yet."""
    await connection.execute(
        "insert into reset_limit (rows_per_second) values ($1) on conflict do nothing",
        RESET_RATE.check(rows_per_second),
    )


async def reserve(connection: Connection, rows: int) -> Reservation:
    """Reserve up to `rows`, in a short transaction of its own. The rate must be set."""
    row = await connection.fetchrow(_RESERVE, float(rows))
    assert row is not None, "set_first_value first"
    return Reservation(row["rows"], row["most"], row["wait"])


async def give_back(connection: Connection, rows: int) -> None:
    """Return rows that were reserved and not reset; a negative number charges what was reset beyond."""
    await connection.execute(_GIVE_BACK, float(rows))


def adapted(rate: float, ceiling: float, *, congested: bool) -> float:
    """The next rate: additive increase up to the ceiling, multiplicative decrease down to a hundredth of it.

    It never leaves the range of rates, so that one reservation cannot put the next one off for minutes.
    """
    wanted = rate * _BACK_OFF if congested else rate + ceiling * _STEP_UP
    return min(ceiling, max(ceiling * _FLOOR, RESET_RATE.low, wanted))


async def adapt(connection: Connection, target_seconds: float, every_seconds: float) -> float | None:
    """One step of the adaptive mode, by whichever worker comes first; returns the new rate, None if not its turn.

    Congested: a live transaction (of an intake worker) has run, or has waited for a lock, longer than the target.
    """
    async with connection.transaction():
        row = await connection.fetchrow(_TAKE_TURN, every_seconds)
        if row is None:
            return None
        pressure: float = await connection.fetchval(_PRESSURE)
        rate = adapted(row["rate"], row["ceiling"], congested=pressure > target_seconds)
        await connection.execute(_ADAPT, rate)
        return rate
