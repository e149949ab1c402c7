"""What has become right: securities without a key behind, and corrections that no key waits for (design, Corrections).

In a transaction of its own, after the valuation or the reset that may have been the last one has committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from sinks import corrections
from sinks.database import BY_INDEX, Connection

# Asked security by security, whatever the statistics say: while a giant's reset is news to them, an anti-join would
# hold every security against every key that is behind.
_ALL_VALUED = """
(select 1 from position_state s where s.security_id = d.security_id and s.watermark_date < $2 limit 1) is null
"""

# Securities without a key behind are done. So are those whose first correction to be settled no key waits for any more:
# late trades may always keep some key behind. Where the first key behind waits for it, no other is looked at.
_DONE = """
select d.security_id
from securities d
left join lateral (
    select coalesce(s.reset_seq, 9223372036854775807) as reset_seq from position_state s
    where s.security_id = d.security_id and s.watermark_date < $2
    limit 1
) as behind on true
where d.security_id = any($1::text[]) and (behind.reset_seq is null or exists (
    select from (
        select min(c.seq + 0) as seq from corrections c
        where c.security_id = d.security_id and c.right_at is null and c.reset_at is not null
    ) as unsettled
    where behind.reset_seq > unsettled.seq
      and (select 1 from position_state s where s.security_id = d.security_id and s.reset_seq <= unsettled.seq limit 1)
          is null))
"""

# Who holds the row sees to it, or the next sweep does.
_HOLD = """
select security_id from securities where security_id = any($1::text[])
order by security_id
for no key update skip locked
"""

_RAISE = f"""
update securities d set valued_through = $2
where d.security_id = any($1::text[]) and d.valued_through < $2 and {_ALL_VALUED}
"""


async def settle(
    connection: Connection, passed: Sequence[str], latest: date | None
) -> tuple[int, list[corrections.Right]]:
    """Securities without a key behind are told so, and corrections that no key waits for; looked at before locking."""
    if not passed:
        return 0, []
    async with connection.transaction():
        await connection.execute(BY_INDEX)
        done = [row["security_id"] for row in await connection.fetch(_DONE, passed, latest)]
        if not done:
            return 0, []
        held = [row["security_id"] for row in await connection.fetch(_HOLD, done)]
        raised = 0
        if latest is not None:
            raised = int((await connection.execute(_RAISE, held, latest)).split()[-1])
        return raised, await corrections.settle(connection, held)
