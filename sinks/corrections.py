"""The ledger of corrections: one late input's effect on one security, from arrival until the books are right.

Sequence numbers are drawn while the security's row is held, so per security they commit in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from sinks.database import Connection

_ENSURE = """
insert into securities (security_id)
select id from unnest($1::text[]) as id order by id collate "C"
on conflict do nothing
"""

_LOCK = """
select security_id from securities
where security_id = any($1::text[])
order by security_id
for no key update
"""

_ISSUE = """
with late as (
    select security_id, earliest_date, nextval('correction_seq') as seq
    from unnest($1::text[], $2::date[]) as late (security_id, earliest_date)
    order by security_id collate "C"
), ledger as (
    insert into corrections (seq, security_id, earliest_date, reason)
    select seq, security_id, earliest_date, $3 from late
), triggers as (
    insert into outbox_events (topic, message_key, value)
    select 'reprocessing-triggers', convert_to(security_id, 'UTF8'), convert_to(jsonb_build_object(
        'security_id', security_id, 'earliest_impacted_date', earliest_date, 'seq', seq, 'reason', $3::text)::text,
        'UTF8')
    from late order by seq
)
select security_id, seq from late
"""

# Needs no job: the rebuild has reset the key in the same transaction.
_RECORD = """
insert into corrections (seq, security_id, earliest_date, reason, reset_at)
select nextval('correction_seq'), security_id, earliest_date, $3, clock_timestamp()
from unnest($1::text[], $2::date[]) as late (security_id, earliest_date)
order by security_id collate "C"
returning security_id, seq
"""


async def lock_securities(connection: Connection, security_ids: Sequence[str]) -> None:
    """Hold the securities' rows until commit, last in the lock order, creating what is missing."""
    ids = sorted(set(security_ids), key=str.encode)
    await connection.execute(_ENSURE, ids)
    await connection.execute(_LOCK, ids)


async def record(connection: Connection, done: Sequence[tuple[str, date]], reason: str) -> dict[str, int]:
    """One correction per security whose keys this transaction has reset itself; returns seq by security.

    The caller holds the securities' rows.
    """
    rows = await connection.fetch(_RECORD, [s for s, _ in done], [day for _, day in done], reason)
    return {row["security_id"]: row["seq"] for row in rows}


async def issue(connection: Connection, late: Sequence[tuple[str, date]], reason: str) -> dict[str, int]:
    """One correction per (security, earliest date) with its trigger in the outbox; returns seq by security.

    Each security may appear once.
    """
    if not late:
        return {}
    await lock_securities(connection, [security_id for security_id, _ in late])
    rows = await connection.fetch(_ISSUE, [s for s, _ in late], [day for _, day in late], reason)
    return {row["security_id"]: row["seq"] for row in rows}
