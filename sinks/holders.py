"""Whom a correction reaches, and which keys are due: decided by `position_state.closed_on` alone, without the history.

closed_on is the date from whose end on a key holds nothing, null while it holds something. A closed key that was
rebuilt or reset is REPROCESSING, and due until a valuation has reached L, whatever its closed_on.

Deciding by closed_on before the row is locked loses nothing: whoever changes a history pulls the key's watermark back
to the touched place in the same transaction, and the price that a correction is about was stored before its job.
"""

from __future__ import annotations

from collections.abc import Sequence

from sinks.booking import Booked
from sinks.database import Connection
from sinks.history import columns


def last_held_before(day: str) -> str:
    """SQL: the business date before `day`; who closed after it held something at its end, or later (design, Sinks)."""
    return f"coalesce((select max(d.business_date) from business_dates d where d.business_date < {day}), '-infinity')"


def affected(key: str, since: str) -> str:
    """SQL: whether a correction reaches the row `key` of position_state; since: see last_held_before."""
    return f"({key}.closed_on is null or {key}.closed_on > {since})"


def due(key: str, latest: str) -> str:
    """SQL: whether dates up to L of the row `key` of position_state may need a snapshot.

    A closed position leaves its row of zeros on the first business date after it closed, and nothing after that; but
    what was reset is looked at, whatever it was reset for.
    """
    covered = f"(select max(d.business_date) from business_dates d where d.business_date <= {key}.watermark_date)"
    return (
        f"({key}.watermark_date < {latest} and ({key}.status = 'REPROCESSING' or {key}.closed_on is null "
        f"or {key}.closed_on > {key}.watermark_date or {key}.closed_on > coalesce({covered}, '-infinity')))"
    )


_MARK = """
update position_state s set closed_on = key.closed_on
from unnest($1::text[], $2::text[], $3::date[]) as key (security_id, portfolio_id, closed_on)
where s.security_id = key.security_id and s.portfolio_id = key.portfolio_id
  and s.closed_on is distinct from key.closed_on
"""


async def mark_closed(connection: Connection, keys: Sequence[Booked]) -> None:
    """Keep closed_on true. The caller has booked the histories and holds the keys."""
    rows = []
    for booked in keys:
        plan, last = booked.plan, booked.last
        closed = None
        if (last.state if last else plan.state).quantity == 0:
            # Without a row of its own the rebuild ends with what it kept, which lies before the touched place.
            closed = last.transaction.position_date if last else plan.rebuilt_from
        rows.append((*plan.key, closed))
    await connection.execute(_MARK, *columns(rows))
