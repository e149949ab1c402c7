"""The ledger of corrections: one late input's effect on one security, from arrival until the books are right.

Sequence numbers are drawn while the security's row is held, so per security they commit in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime

from sinks.database import BY_INDEX, Connection

VALUES_KEPT = 10
"""Of how many keys a correction keeps the values before and after."""

_SEQS_TOLD = 1_000  # a message must not grow with a restatement

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
    insert into outbox_events (topic, message_key, headers, value)
    select 'reprocessing-triggers', convert_to(security_id, 'UTF8'),
           jsonb_build_object('security_id', security_id, 'seq', seq::text), convert_to(jsonb_build_object(
        'security_id', security_id, 'earliest_impacted_date', earliest_date, 'seq', seq, 'reason', $3::text)::text,
        'UTF8')
    from late order by seq
)
select security_id, seq from late
"""

# No trigger yet: the row comes due when nothing more has arrived for a while, the ones that settle with it likewise.
_SETTLE_DOWN = """
with late as (
    select security_id, earliest_date, nextval('correction_seq') as seq, least(
        clock_timestamp() + make_interval(secs => $4),
        make_interval(secs => $5) + coalesce((
            select min(c.issued_at) from corrections c
            where c.security_id = late.security_id and c.right_at is null and c.triggered_at is null),
            clock_timestamp())) as due
    from unnest($1::text[], $2::date[]) as late (security_id, earliest_date)
    order by security_id collate "C"
), earlier as (
    update corrections c set reissue_at = late.due from late
    where c.security_id = late.security_id and c.right_at is null and c.triggered_at is null
), ledger as (
    insert into corrections (seq, security_id, earliest_date, reason, triggered_at, reissue_at)
    select seq, security_id, earliest_date, $3, null, due from late
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

# One scan of the security's keys, however many corrections are open.
_SETTLE = f"""
with open_keys as materialized (
    select security_id, (select min(s.reset_seq) from position_state s where s.security_id = open.security_id) as seq
    from (select distinct security_id from corrections
          where security_id = any($1::text[]) and right_at is null and reset_at is not null) as open
), valued as (
    select of_key.seq from open_keys k
    cross join lateral (
        select seq from corrections c
        where c.security_id = k.security_id and c.right_at is null and c.reset_at is not null
          and (k.seq is null or k.seq > c.seq)
        offset 0) as of_key
), changes as materialized (
    select valued.seq, d.*
    from valued cross join lateral (
        select coalesce(sum(snapshots), 0)::bigint as snapshots, coalesce(sum(absolute_change), 0) as absolute_change,
               min(from_date) as from_date, max(to_date) as to_date
        from correction_changes where seq = valued.seq offset 0
    ) as d
), removed as (
    delete from correction_changes where seq = any (array(select seq from valued))
), trimmed as (
    delete from correction_values where ctid = any (array(
        select d.place
        from valued cross join lateral (
            select ctid as place, row_number() over (order by abs(
                coalesce(market_value_after, 0) - coalesce(market_value_before, 0)) desc, portfolio_id) as number
            from correction_values where seq = valued.seq offset 0
        ) as d
        where d.number > {VALUES_KEPT}))
), settled as (
    update corrections c set
        right_at = clock_timestamp(), snapshots_changed = changes.snapshots,
        absolute_change = changes.absolute_change, changed_from = changes.from_date, changed_to = changes.to_date
    from changes where c.seq = changes.seq
    returning c.seq, c.security_id, c.earliest_date, c.reason, coalesce(c.job_id, c.seq) as job_id, c.issued_at,
              c.reset_at, c.right_at, c.snapshots_changed, c.absolute_change, c.changed_from, c.changed_to
), announced as (
    insert into outbox_events (topic, message_key, headers, value)
    select 'reprocessing-status', convert_to(e.security_id, 'UTF8'),
           jsonb_build_object('security_id', e.security_id, 'job_id', e.job_id::text), convert_to(jsonb_build_object(
        'job_id', e.job_id, 'security_id', e.security_id, 'status', 'BOOKS_RIGHT', 'keys_total', j.keys_total,
        'keys_done', j.keys_done, 'at', clock_timestamp(), 'corrections', e.corrections, 'seqs', e.seqs,
        'earliest_impacted_date', e.earliest_date, 'from_date', e.from_date, 'to_date', e.to_date,
        'snapshots_changed', e.snapshots, 'absolute_change', trim_scale(e.absolute_change))::text, 'UTF8')
    from (
        select security_id, job_id, count(*) as corrections, (array_agg(seq order by seq))[:{_SEQS_TOLD}] as seqs,
               min(earliest_date) as earliest_date, min(changed_from) as from_date, max(changed_to) as to_date,
               sum(snapshots_changed)::bigint as snapshots, sum(absolute_change) as absolute_change
        from settled group by security_id, job_id
    ) as e left join reprocessing_jobs j using (job_id)
    order by e.job_id
)
select seq, security_id, earliest_date, reason, job_id, issued_at, reset_at, right_at from settled order by seq
"""

_UNSETTLED = """
select distinct security_id from corrections
where right_at is null and reset_at is not null and security_id > $1
order by security_id limit $2
"""

_OVERDUE = """
select distinct security_id from corrections
where right_at is null and reset_at is null and not held and reissue_at <= clock_timestamp()
limit 1000
"""

# The trigger covers all that is open, so it counts as an attempt for every open row: a stream of corrections that wait
# for a slow sink does not make a stream of repairs. It is a repair only if something due was triggered before.
_REISSUE = """
with open as (
    select security_id, min(earliest_date) as earliest_date, max(seq) as seq,
           case when bool_or(reissue_at <= clock_timestamp() and triggered_at is not null) then 'repair'
                else (array_agg(reason order by seq desc))[1] end as reason
    from corrections
    where security_id = any($1::text[]) and right_at is null and reset_at is null and not held
    group by security_id
    having bool_or(reissue_at <= clock_timestamp())
), backoff as (
    update corrections c set
        reissue_count = reissue_count + (triggered_at is not null)::int,
        triggered_at = coalesce(triggered_at, clock_timestamp()),
        reissue_at = clock_timestamp() + make_interval(secs =>
            $2 * case when triggered_at is null then 1 else 2 ^ least(reissue_count, 6) end)
    from open
    where c.security_id = open.security_id and c.right_at is null and c.reset_at is null and not c.held
), triggers as (
    insert into outbox_events (topic, message_key, headers, value)
    select 'reprocessing-triggers', convert_to(security_id, 'UTF8'),
           jsonb_build_object('security_id', security_id, 'seq', seq::text), convert_to(jsonb_build_object(
        'security_id', security_id, 'earliest_impacted_date', earliest_date, 'seq', seq, 'reason', reason)::text,
        'UTF8')
    from open order by seq
)
select security_id, seq from open order by seq
"""


@dataclass(frozen=True, slots=True)
class Right:
    """A correction that every key is valued past again. job_id: of the job that reset them; without one, the seq."""

    seq: int
    security_id: str
    earliest_date: date
    reason: str
    job_id: int
    issued_at: datetime
    reset_at: datetime
    right_at: datetime

    @property
    def seconds(self) -> float:
        """From the late input's arrival until the books were right."""
        return (self.right_at - self.issued_at).total_seconds()


@dataclass(frozen=True, slots=True)
class Debounce:
    """Late input of a security settles until nothing has come for `seconds`, at most `ceiling_seconds` in all."""

    seconds: float
    ceiling_seconds: float


async def lock_securities(connection: Connection, security_ids: Sequence[str]) -> None:
    """Hold the securities' rows until commit, last in the lock order, creating what is missing."""
    ids = sorted(set(security_ids), key=str.encode)
    await connection.execute(_ENSURE, ids)
    await connection.execute(_LOCK, ids)


async def hold_securities(connection: Connection, security_ids: Sequence[str]) -> None:
    """Hold the rows of securities that are known to exist."""
    await connection.execute(_LOCK, list(set(security_ids)))


async def record(connection: Connection, done: Sequence[tuple[str, date]], reason: str) -> dict[str, int]:
    """One correction per security whose keys this transaction has reset itself; returns seq by security.

    The caller holds the securities' rows.
    """
    rows = await connection.fetch(_RECORD, [s for s, _ in done], [day for _, day in done], reason)
    return {row["security_id"]: row["seq"] for row in rows}


async def issue(
    connection: Connection, late: Sequence[tuple[str, date]], reason: str, debounce: Debounce | None = None
) -> dict[str, int]:
    """One correction per (security, earliest date); returns seq by security. Each security may appear once.

    Its trigger is in the outbox with it; with `debounce`, `reissue` writes the trigger once things have settled.
    """
    if not late:
        return {}
    await lock_securities(connection, [security_id for security_id, _ in late])
    securities, days = [security_id for security_id, _ in late], [day for _, day in late]
    if debounce:
        await connection.execute(BY_INDEX)
        settle = (debounce.seconds, debounce.ceiling_seconds)
        rows = await connection.fetch(_SETTLE_DOWN, securities, days, reason, *settle)
    else:
        rows = await connection.fetch(_ISSUE, securities, days, reason)
    return {row["security_id"]: row["seq"] for row in rows}


async def last_seq(connection: Connection) -> int:
    """The highest number drawn so far, or a little more."""
    number: int = await connection.fetchval("select last_value from correction_seq")
    return number


async def settle(connection: Connection, security_ids: Sequence[str]) -> list[Right]:
    """Mark right what is reset and valued again, and announce it (BOOKS_RIGHT).

    In a transaction of its own, after the valuation or reset that may have been the last one has committed; the
    caller holds the securities' rows.
    """
    return [Right(**row) for row in await connection.fetch(_SETTLE, list(security_ids))]


async def unsettled(connection: Connection, after: str, limit: int) -> list[str]:
    """The first securities after that one with corrections that are reset and not yet known to be right."""
    return [row["security_id"] for row in await connection.fetch(_UNSETTLED, after, limit)]


async def reissue(connection: Connection, after_seconds: float) -> dict[str, int]:
    """Trigger what has settled, and again what has not been reset for too long (repair); returns seq by security.

    Safe whatever became of the first trigger: triggers and jobs are idempotent by seq. after_seconds doubles with
    each attempt, up to 64 times.
    """
    overdue = [row["security_id"] for row in await connection.fetch(_OVERDUE)]
    if not overdue:
        return {}
    await lock_securities(connection, overdue)
    rows = await connection.fetch(_REISSUE, overdue, after_seconds)
    return {row["security_id"]: row["seq"] for row in rows}
