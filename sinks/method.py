"""Which cost basis method the books were written with: it is one for the installation, and a setting of each worker."""

from __future__ import annotations

from sinks.database import Connection
from sinks.model import CostBasisMethod

# Only FIFO keeps lots: one position that holds something tells. head_sequence is null where no booking goes on.
_OF_BOOKS = """
select tail.head_sequence > 0
from position_state s
cross join lateral (
    select quantity, head_sequence from position_history h
    where h.security_id = s.security_id and h.portfolio_id = s.portfolio_id and h.superseded_epoch is null
    order by sequence desc limit 1
) as tail
where s.closed_on is null and tail.quantity <> 0 and tail.head_sequence is not null
limit 1
"""


async def of_books(connection: Connection) -> CostBasisMethod | None:
    """None while no position holds anything."""
    has_lots = await connection.fetchval(_OF_BOOKS)
    if has_lots is None:
        return None
    return "FIFO" if has_lots else "AVCO"
