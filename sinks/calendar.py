"""The calendar sink: closing business dates. Its lock makes "late" exact (design, Price sink)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date

from sinks import corrections
from sinks.database import Connection

_CALENDAR_LOCK = 0x6361_6C65  # advisory locks are fair; shared row locks would starve the close

_CLOSE = """
insert into business_dates (business_date)
select distinct day from unnest($1::date[]) as day order by day
on conflict do nothing
returning business_date
"""

_SECURITIES_WITH_KEYS = """
select security_id from securities s
where exists (select from position_state p where p.security_id = s.security_id)
"""


@dataclass(frozen=True, slots=True)
class CalendarOutcome:
    """Dates newly closed, and the corrections issued because some of them lie before L, by security."""

    closed: int
    corrections: Mapping[str, int] = field(default_factory=dict)


async def lock_shared(connection: Connection) -> None:
    """Hold the calendar still until commit: no date closes meanwhile."""
    await connection.execute("select pg_advisory_xact_lock_shared($1)", _CALENDAR_LOCK)


async def latest_closed(connection: Connection) -> date | None:
    """L. To be read in a statement after the lock, or it may be the L before the wait."""
    latest: date | None = await connection.fetchval("select max(business_date) from business_dates")
    return latest


async def apply(connection: Connection, dates: Sequence[date]) -> CalendarOutcome:
    """Close the dates; again is a no-op. A date before L makes every holder's missing date dirty (reason calendar)."""
    await connection.execute("select pg_advisory_xact_lock($1)", _CALENDAR_LOCK)
    before = await latest_closed(connection)
    closed = [row["business_date"] for row in await connection.fetch(_CLOSE, list(dates))]
    repaired = [day for day in closed if before is not None and day < before]
    if not repaired:
        return CalendarOutcome(len(closed))
    rows = await connection.fetch(_SECURITIES_WITH_KEYS)
    issued = await corrections.issue(connection, [(row["security_id"], min(repaired)) for row in rows], "calendar")
    return CalendarOutcome(len(closed), issued)
