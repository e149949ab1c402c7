"""What operators do to jobs and to the reset rate: every action is one transaction, with its audit row in it.

An action that cannot be done raises Refused and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from sinks import actions, calendar, corrections, holders, resets
from sinks.database import Connection
from sinks.ranges import PRIORITY, RESET_RATE, OutOfRange, Real, Whole

_JOB = """
select job_id, job_type, security_id, earliest_impacted_date, seq, status, priority, attempt_count, failure_reason,
       keys_total, keys_done, created_at, started_at, finished_at, next_attempt_at
from reprocessing_jobs
"""

_LIST = f"""
{_JOB}
where ($1::text[] is null or status = any($1)) and ($2::text is null or security_id = $2)
  and ($3::bigint is null or job_id < $3)
order by job_id desc
limit $4
"""

_CORRECTIONS_OF = """
select seq, earliest_date, reason, issued_at, held, reset_at, right_at
from corrections where security_id = $1 and job_id = $2
order by seq desc limit $3
"""

_LOCK_JOB = f"{_JOB} where job_id = $1 for no key update"

# A new correction covers what is held; repair may see to it again from now on.
_RELEASE = """
with held as (
    select seq, earliest_date from corrections
    where security_id = $1 and job_id = $2 and held and right_at is null
), released as (
    update corrections c set held = false, reissue_count = 0, reissue_at = clock_timestamp() + make_interval(secs => $3)
    from held where c.seq = held.seq
)
select min(earliest_date) as earliest_date, count(*) as corrections from held
"""

_LIMIT = """
select rows_per_second, paused, adapted_rows_per_second,
       greatest(0, extract(epoch from tat - clock_timestamp()))::float8 as owed_seconds
from reset_limit
"""

_SET_LIMIT = """
insert into reset_limit as stored (rows_per_second, paused)
values (coalesce($1::float8, $3::float8), coalesce($2::boolean, false))
on conflict (only_row) do update set
    rows_per_second = coalesce($1::float8, stored.rows_per_second), paused = coalesce($2, stored.paused),
    tat = least(stored.tat, clock_timestamp()),
    adapted_rows_per_second = case when $1::float8 is null then stored.adapted_rows_per_second end
"""

_IMPACT = f"""
with reached as (
    select s.security_id, s.portfolio_id
    from position_state s, (select {holders.last_held_before("$2::date")} as since) as held
    where s.security_id = $1 and {holders.affected("s", "held.since")}
)
select (select count(*) from reached) as keys,
       (select count(*) from reached join daily_position_snapshots v using (security_id, portfolio_id)
        where v.valuation_date >= $2) as snapshots
"""

_LOCK_KEYS = """
select security_id, portfolio_id from position_state s
where portfolio_id = $1 and ($2::text is null or security_id = $2)
order by security_id, portfolio_id
for no key update
"""

_PULL_BACK = f"""
update position_state s set {resets.PULL_BACK.format(day="$4::date", seq="key.seq")}
from unnest($1::text[], $2::text[], $3::bigint[]) as key (security_id, portfolio_id, seq)
where s.security_id = key.security_id and s.portfolio_id = key.portfolio_id
"""

_LOWER = """
update securities set valued_through = least(valued_through, $2::date - 1) where security_id = any($1::text[])
"""

_SHOWN_CORRECTIONS = 1_000  # of a job
_REISSUE_AFTER = 30.0  # seconds; the new correction's own trigger comes first


class Refused(Exception):  # noqa: N818 - an answer to the operator
    """The action cannot be done; one line says why."""


@dataclass(frozen=True, slots=True)
class LimitState:
    """The reset rate: what the operator set, and what the adaptive mode makes of it (None: off)."""

    rows_per_second: float
    paused: bool
    adapted_rows_per_second: float | None
    owed_seconds: float

    @property
    def in_force(self) -> float:
        """Keys per second now; 0 while paused."""
        if self.paused:
            return 0.0
        return min(self.rows_per_second, self.adapted_rows_per_second or self.rows_per_second)


@dataclass(frozen=True, slots=True)
class Impact:
    """What a correction would touch; reset_seconds: at the rate in force, None while that is not known or zero."""

    security_id: str
    from_date: date
    keys: int
    snapshots: int
    reset_seconds: float | None


@dataclass(frozen=True, slots=True)
class Reprocessing:
    """An operator's correction: its sequence number per security, and the keys reset at once (None: by a job)."""

    seqs: Mapping[str, int]
    keys: int | None


async def list_jobs(
    connection: Connection,
    *,
    statuses: Sequence[str] | None = None,
    security_id: str | None = None,
    before: int | None = None,
    limit: int = 200,
) -> list[dict[str, Any]]:
    """Jobs, newest first. before: only jobs with a smaller job_id (the next page)."""
    wanted = list(statuses) if statuses else None
    return [dict(row) for row in await connection.fetch(_LIST, wanted, security_id, before, limit)]


async def show_job(connection: Connection, job_id: int) -> dict[str, Any]:
    """One job with the latest corrections it covers. Raises Refused for an unknown one."""
    row = await connection.fetchrow(f"{_JOB} where job_id = $1", job_id)
    if row is None:
        raise Refused(f"there is no job {job_id}")
    covered = await connection.fetch(_CORRECTIONS_OF, row["security_id"], job_id, _SHOWN_CORRECTIONS)
    return {**row, "corrections": [dict(each) for each in reversed(covered)]}


async def cancel_job(connection: Connection, actor: str, job_id: int) -> dict[str, Any]:
    """Stop the job before its next chunk; its corrections are held and its keys stay visibly stale until requeued."""
    async with connection.transaction():
        job = await _locked(connection, job_id)
        if job["status"] in resets.TERMINAL:
            raise Refused(f"job {job_id} is {job['status']}: there is nothing to cancel")
        await corrections.hold_securities(connection, [job["security_id"]])
        await resets.end_jobs(connection, [job_id], "CANCELLED", f"cancelled by {actor}")
        await actions.write_down(connection, actor, "cancel", {"job_id": job_id})
        return await show_job(connection, job_id)


async def requeue_job(connection: Connection, actor: str, job_id: int) -> dict[str, Any]:
    """Release what a FAILED or CANCELLED job left held, under a new correction from the earliest held date.

    Returns the job with `requeued_as`, the sequence number of that correction.
    """
    async with connection.transaction():
        job = await _locked(connection, job_id)
        if job["status"] not in ("FAILED", "CANCELLED"):
            raise Refused(f"job {job_id} is {job['status']}: only FAILED and CANCELLED ones are requeued")
        security = job["security_id"]
        await corrections.hold_securities(connection, [security])
        held = await connection.fetchrow(_RELEASE, security, job_id, _REISSUE_AFTER)
        if held is None or held["earliest_date"] is None:
            raise Refused(f"job {job_id} holds no correction any more: it was requeued, or another job covered them")
        seqs = await corrections.issue(connection, [(security, held["earliest_date"])], "requeue")
        await actions.write_down(connection, actor, "requeue", {"job_id": job_id, "seq": seqs[security]})
        return {**(await show_job(connection, job_id)), "requeued_as": seqs[security]}


async def prioritise_job(connection: Connection, actor: str, job_id: int, priority: int) -> dict[str, Any]:
    """Higher goes first, in the reset and then in the valuation; 0 is every job's priority at first."""
    _check(PRIORITY, "priority", priority)
    async with connection.transaction():
        job = await _locked(connection, job_id)
        if job["status"] in ("FAILED", "CANCELLED"):
            raise Refused(f"job {job_id} is {job['status']}: requeue it first")
        await connection.execute("update reprocessing_jobs set priority = $2 where job_id = $1", job_id, priority)
        await actions.write_down(connection, actor, "prioritise", {"job_id": job_id, "priority": priority})
        return await show_job(connection, job_id)


async def pause(connection: Connection, actor: str, first_rate: float) -> LimitState:
    """No chunk begins from now on, on any worker. first_rate: the setting, where no rate is stored yet."""
    return await _limit(connection, actor, "pause", first_rate, paused=True)


async def resume(connection: Connection, actor: str, first_rate: float) -> LimitState:
    """Go on at the rate that is set."""
    return await _limit(connection, actor, "resume", first_rate, paused=False)


async def throttle(connection: Connection, actor: str, rows_per_second: float) -> LimitState:
    """Set the cluster's reset rate, keys per second."""
    _check(RESET_RATE, "rows_per_second", rows_per_second)
    return await _limit(connection, actor, "throttle", rows_per_second, rate=rows_per_second)


async def limit_state(connection: Connection) -> LimitState | None:
    """The reset rate; None before any worker or operator has set it."""
    row = await connection.fetchrow(_LIMIT)
    return LimitState(**row) if row else None


async def impact(connection: Connection, security_id: str, from_date: date) -> Impact:
    """A dry run: keys that a correction from the date would reset, and snapshots that would be valued again."""
    await _require_known(connection, security_id)
    row = await connection.fetchrow(_IMPACT, security_id, from_date)
    state = await limit_state(connection)
    assert row is not None
    seconds = row["keys"] / state.in_force if state and state.in_force else None
    return Impact(security_id, from_date, row["keys"], row["snapshots"], seconds)


async def reprocess(
    connection: Connection,
    actor: str,
    from_date: date,
    *,
    security_id: str | None = None,
    portfolio_id: str | None = None,
) -> Reprocessing:
    """Value again from the date on: a security (by a job, like any correction), a portfolio, or one key of both.

    A portfolio's keys are few and have no herd: they are reset here, under corrections that need no job.
    """
    if security_id is None and portfolio_id is None:
        raise Refused("name a security, a portfolio, or both")
    async with connection.transaction():
        await _require_closed(connection, from_date)
        arguments = {"security_id": security_id, "portfolio_id": portfolio_id, "from_date": from_date.isoformat()}
        await actions.write_down(connection, actor, "reprocess", arguments)
        if portfolio_id is None:
            assert security_id is not None
            return await _reprocess_security(connection, security_id, from_date)
        return await _reprocess_keys(connection, portfolio_id, security_id, from_date)


async def _reprocess_security(connection: Connection, security_id: str, from_date: date) -> Reprocessing:
    await _require_known(connection, security_id)
    return Reprocessing(await corrections.issue(connection, [(security_id, from_date)], "operator"), None)


async def _reprocess_keys(
    connection: Connection, portfolio_id: str, security_id: str | None, from_date: date
) -> Reprocessing:
    keys = await connection.fetch(_LOCK_KEYS, portfolio_id, security_id)
    if not keys:
        held = f"security {security_id}" if security_id else "anything"
        raise Refused(f"portfolio {portfolio_id} has never held {held}")
    securities = [key["security_id"] for key in keys]
    await corrections.hold_securities(connection, securities)
    seqs = await corrections.record(connection, [(each, from_date) for each in securities], "operator")
    ids = [key["portfolio_id"] for key in keys]
    await connection.execute(_PULL_BACK, securities, ids, [seqs[each] for each in securities], from_date)
    await connection.execute(_LOWER, securities, from_date)
    return Reprocessing(seqs, len(keys))


async def _limit(
    connection: Connection,
    actor: str,
    action: str,
    first_rate: float,
    *,
    rate: float | None = None,
    paused: bool | None = None,
) -> LimitState:
    async with connection.transaction():
        await connection.execute(_SET_LIMIT, rate, paused, first_rate)
        await actions.write_down(connection, actor, action, {} if rate is None else {"rows_per_second": rate})
        state = await limit_state(connection)
        assert state is not None
        return state


def _check(numbers: Real | Whole, name: str, value: float) -> None:
    try:
        numbers.check(value)
    except OutOfRange as error:
        raise Refused(f"{name}: {error}") from None


async def _require_known(connection: Connection, security_id: str) -> None:
    if await connection.fetchval("select 1 from securities where security_id = $1", security_id) is None:
        raise Refused(f"security {security_id} is unknown: it has no price and no position")


async def _require_closed(connection: Connection, from_date: date) -> None:
    """No date after L has been valued: a correction from there on would wait for a valuation that nothing makes due."""
    latest = await calendar.latest_closed(connection)
    if latest is None or from_date > latest:
        closed = f"the latest closed date is {latest}" if latest else "no date is closed"
        raise Refused(f"nothing has been valued from {from_date} on: {closed}")


async def _locked(connection: Connection, job_id: int) -> Mapping[str, Any]:
    row: Mapping[str, Any] | None = await connection.fetchrow(_LOCK_JOB, job_id)
    if row is None:
        raise Refused(f"there is no job {job_id}")
    return row
