"""The cluster-wide limit on watermark resets: a generic cell rate algorithm in one row (design, Watermark sink)."""

from __future__ import annotations

from dataclasses import dataclass

from sinks.database import Connection

_LONGEST_SECONDS = 0.5  # of rows, in one reservation: how late a new rate may take effect

_RESERVE = f"""
update reset_limit set tat = greatest(tat, clock_timestamp()) + make_interval(
    secs => least($1, greatest(1, floor(rows_per_second * {_LONGEST_SECONDS}))) / rows_per_second)
where not paused
returning least($1, greatest(1, floor(new.rows_per_second * {_LONGEST_SECONDS})))::int as rows,
          greatest(0, extract(epoch from old.tat - clock_timestamp()))::float8 as wait_seconds
"""


@dataclass(frozen=True, slots=True)
class Reservation:
    """So many rows, not before the wait is over."""

    rows: int
    wait_seconds: float


async def set_first_value(connection: Connection, rows_per_second: float) -> None:
    """The setting counts only where no rate is stored yet."""
    await connection.execute(
        "insert into reset_limit (rows_per_second) values ($1) on conflict do nothing", rows_per_second
    )


async def reserve(connection: Connection, rows: int) -> Reservation | None:
    """Reserve up to `rows`, in a short statement of its own; None while resets are paused."""
    row = await connection.fetchrow(_RESERVE, float(rows))
    return Reservation(row["rows"], row["wait_seconds"]) if row else None
