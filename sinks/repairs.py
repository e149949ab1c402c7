"""Putting right what an audit found, through the paths that put right late input (design, Corrections: the ledger).

Wrong snapshots get a correction and its trigger, as a late price does; a wrong history is booked anew from the
transactions under a new epoch, as a back-dated transaction does.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, time

from sinks import corrections, positions
from sinks.booking import Touch
from sinks.database import Connection
from sinks.model import CostBasisMethod

REASON = "audit"
_EVERYTHING = date(1900, 1, 1)  # no transaction is older (semantics, Bad input)

_ENSURE_KEYS = """
insert into position_state (security_id, portfolio_id, watermark_date)
select * from unnest($1::text[], $2::text[], $3::date[])
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


async def revalue(connection: Connection, securities: Sequence[tuple[str, date]]) -> int:
    """Have every holder of the securities valued again from the date on; returns how many corrections that makes."""
    return len(await corrections.issue(connection, securities, REASON))


async def rebuild(connection: Connection, keys: Sequence[tuple[str, str, date | None]], method: CostBasisMethod) -> int:
    """Book (security_id, portfolio_id) anew from their transactions, valued again from the date on (None: from the
    first); returns how many. A key without transactions is left empty.
    """
    touches = {
        (security, portfolio): Touch(corrected=(datetime.combine(day or _EVERYTHING, time.min, UTC), b""))
        for security, portfolio, day in sorted(keys, key=lambda key: (key[0].encode(), key[1].encode()))
    }
    ids = [security for security, _ in touches], [portfolio for _, portfolio in touches]
    # A key that had no state gets one that is not due yet: booking lowers its watermark, and tells the valuation.
    watermarks = [touch.corrected[0].date() for touch in touches.values() if touch.corrected]
    await connection.execute(_ENSURE_KEYS, *ids, watermarks)
    await connection.execute(_RAISE_EPOCHS, *ids)
    return len(await positions.book(connection, touches, method))
