"""Putting right what an audit found, through the paths that put right late input (design, Corrections: the ledger).

Wrong snapshots get a correction and its trigger, as a late price does; a wrong history is booked anew from the
transactions under a new epoch, as a back-dated transaction does.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, time

from sinks import actions, corrections, positions
from sinks.booking import Touch, lock_order
from sinks.database import Connection
from sinks.history import key_columns
from sinks.model import CostBasisMethod

REASON = "audit"
_ACTION = "repair"
_BEFORE_ALL = date(1900, 1, 1)  # no transaction is older (semantics, Bad input)

_ENSURE_KEYS = """
insert into position_state (security_id, portfolio_id, watermark_date)
select security_id, portfolio_id, $3 from unnest($1::text[], $2::text[]) as key (security_id, portfolio_id)
on conflict do nothing
"""

# No row may be of an epoch that its key has not reached.
_RAISE_EPOCHS = """
update position_state s set epoch = greatest(s.epoch, (
    select max(h.epoch) from position_history h
    where h.security_id = s.security_id and h.portfolio_id = s.portfolio_id))
from unnest($1::text[], $2::text[]) as key (security_id, portfolio_id)
where s.security_id = key.security_id and s.portfolio_id = key.portfolio_id
"""


async def revalue(connection: Connection, actor: str, securities: Sequence[tuple[str, date]]) -> int:
    """Have every holder of the securities valued again from the date on; returns how many corrections that makes."""
    named = [{"security_id": security, "from_date": day.isoformat()} for security, day in securities]
    await actions.write_down(connection, actor, _ACTION, {"securities": named})
    return len(await corrections.issue(connection, securities, REASON))


async def rebuild(connection: Connection, actor: str, keys: Sequence[tuple[str, str]], method: CostBasisMethod) -> int:
    """Book (security_id, portfolio_id) anew from all their transactions; returns how many.

    A key without transactions is left empty.
    """
    named = [{"security_id": security, "portfolio_id": portfolio} for security, portfolio in keys]
    await actions.write_down(connection, actor, _ACTION, {"keys": named})
    beginning = datetime.combine(_BEFORE_ALL, time.min, UTC)
    touches = {key: Touch(corrected=(beginning, b"")) for key in sorted(keys, key=lock_order)}
    ids = key_columns(touches)
    # A key that had no state gets one that is not due: booking lowers its watermark, and tells the valuation.
    await connection.execute(_ENSURE_KEYS, *ids, _BEFORE_ALL)
    await connection.execute(_RAISE_EPOCHS, *ids)
    bookings, _ = await positions.book(connection, touches, method)
    return len(bookings)
