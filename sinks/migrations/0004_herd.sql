-- Operators steer resets; closed positions are not valued; triggers may settle first.

-- closed_on: from the end of this date on the key holds nothing, as far as its history goes; null while it holds
-- something. It decides whom a correction reaches without a look at the history.
alter table position_state add column closed_on date;

update position_state s set closed_on = last.position_date
from (
    select distinct on (security_id, portfolio_id) security_id, portfolio_id, quantity, position_date
    from position_history where superseded_epoch is null
    order by security_id, portfolio_id, sequence desc
) as last
where last.security_id = s.security_id and last.portfolio_id = s.portfolio_id and last.quantity = 0;

update position_state s set closed_on = s.watermark_date + 1
where not exists (
    select from position_history h
    where h.security_id = s.security_id and h.portfolio_id = s.portfolio_id and h.superseded_epoch is null);

-- The valuation takes due securities oldest first, page by page.
drop index securities_by_valued_through;
create index securities_by_valued_through on securities (valued_through, security_id);

-- A job's priority: higher goes first. next_attempt_at: after a failed attempt, not before.
alter table reprocessing_jobs
    add column priority int not null default 0,
    add column next_attempt_at timestamptz;
create index reprocessing_jobs_prioritised on reprocessing_jobs (job_id)
    where status in ('PENDING', 'PROCESSING') and priority <> 0;
create index reprocessing_jobs_latest on reprocessing_jobs (status, job_id);

-- triggered_at: when the (first) trigger that covers the row went to the outbox; null while it settles.
-- reissue_at: when the row is due for a trigger, its first one or, after that, a repair.
alter table corrections add column triggered_at timestamptz default clock_timestamp();
-- Every index on corrections but its key begins with the security: a plan made while statistics lag behind a herd of
-- corrections must not walk all of them for each job.
create index corrections_to_reset on corrections (security_id, reissue_at)
    where right_at is null and reset_at is null and not held;
create index corrections_by_job on corrections (security_id, job_id);

-- rows_per_second is what the operator allows; adapted_rows_per_second what the adaptive mode makes of it (null: off).
alter table reset_limit
    add column adapted_rows_per_second double precision check (adapted_rows_per_second > 0),
    add column adapted_at timestamptz not null default clock_timestamp();

-- What operators did: who, when, what.
create table operator_actions (
    action_id bigint      generated always as identity primary key,
    at        timestamptz not null default clock_timestamp(),
    actor     text        not null,
    action    text        not null,
    arguments jsonb       not null
);

-- A key is dirty when its own watermark is behind L, or when a correction that has not reset its holders yet still has
-- to reach it: it held the security at the end of the business date before, or at any time after it.
create or replace view dirty_keys as
    with latest as (select max(business_date) as business_date from business_dates)
    select s.portfolio_id, s.security_id, s.watermark_date
    from position_state s, latest
    where s.watermark_date < latest.business_date
       or exists (
            select from corrections c
            where c.security_id = s.security_id and c.right_at is null and c.reset_at is null
              and c.earliest_date <= latest.business_date
              and s.watermark_date >= c.earliest_date
              and (s.closed_on is null or s.closed_on > coalesce(
                  (select max(d.business_date) from business_dates d where d.business_date < c.earliest_date),
                  '-infinity')));

-- As before, but not strict: so the planner puts it in place instead of calling it row by row, and what has no more
-- places than are kept costs nothing.
create or replace function round_half_even(value numeric, places int) returns numeric
    language sql immutable parallel safe
    return case
        when scale(value) <= places then value
        when abs(value - trunc(value, places)) = 5 * (10::numeric ^ (-places - 1))
             and mod(trunc(value * 10::numeric ^ places), 2) = 0
        then trunc(value, places)
        else round(value, places)
    end;
