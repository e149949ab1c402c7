-- expand: a table that triggers keep, views with more columns, what corrections changed; workers of the version before fill
-- the first without knowing, and leave the last empty.

-- From which dates on corrections that are not reset yet reach a security's keys: a row while there is such a correction.
-- part_from: of those that job_id covers; it has passed the keys up to its cursor, and they are reset. whole_from: of all
-- others. Whoever writes corrections holds the security's row, which orders the writes of this one too.
create table reach (
    security_id text collate "C" primary key,
    whole_from  date,
    part_from   date,
    job_id      bigint,
    check ((part_from is null) = (job_id is null)),
    check (whole_from is not null or part_from is not null)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);

-- A correction that has just been issued belongs to no job.
create function reach_of_added_corrections() returns trigger
    language plpgsql security definer set search_path = tidemark, pg_temp as $$
begin
    insert into reach as r (security_id, whole_from)
    select security_id, min(earliest_date) from added
    where right_at is null and reset_at is null
    group by security_id
    order by security_id
    on conflict (security_id) do update set whole_from = least(r.whole_from, excluded.whole_from);
    return null;
end $$;

-- Of the jobs that open corrections name, the latest is the one at work, if any is; an earlier one was cancelled or failed.
-- EXCEPT compares in one pass; a join's plan is kept, made for as many rows as the first call had.
create function reach_of_changed_corrections() returns trigger
    language plpgsql security definer set search_path = tidemark, pg_temp set enable_seqscan = off as $$
declare
    changed text[];
begin
    changed := array(
        select distinct security_id from (
            select seq, security_id, earliest_date, job_id, reset_at is null and right_at is null from after
            except
            select seq, security_id, earliest_date, job_id, reset_at is null and right_at is null from before
        ) as difference
        order by security_id);
    if cardinality(changed) = 0 then
        return null;
    end if;
    insert into reach as r (security_id, whole_from, part_from, job_id)
    select of_security.security_id, open.whole_from, open.part_from, open.job_id
    from unnest(changed) as of_security (security_id)
    cross join lateral (
        select min(earliest_date) filter (where not is_latest) as whole_from,
               min(earliest_date) filter (where is_latest) as part_from, max(job_id) filter (where is_latest) as job_id
        from (
            select job_id, min(earliest_date) as earliest_date,
                   job_id is not null and row_number() over (order by job_id desc nulls last) = 1 as is_latest
            from (select c.job_id, c.earliest_date from corrections c
                  where c.security_id = of_security.security_id and c.right_at is null and c.reset_at is null
                  offset 0) as each
            group by job_id
        ) as of_job
        having count(*) > 0
    ) as open
    on conflict (security_id) do update set
        whole_from = excluded.whole_from, part_from = excluded.part_from, job_id = excluded.job_id
        where (r.whole_from, r.part_from, r.job_id)
              is distinct from (excluded.whole_from, excluded.part_from, excluded.job_id);
    -- Looked for by each security, whatever the statistics say: an anti-join might read all that is open.
    delete from reach r
    where r.security_id = any(changed) and (
        select 1 from corrections c
        where c.security_id = r.security_id and c.right_at is null and c.reset_at is null limit 1) is null;
    return null;
end $$;

create trigger reach_of_added after insert on corrections referencing new table as added
    for each statement execute function reach_of_added_corrections();
create trigger reach_of_changed after update on corrections referencing new table as after old table as before
    for each statement execute function reach_of_changed_corrections();

-- The triggers' locks have waited for all who were writing corrections.
insert into reach (security_id, whole_from)
select security_id, min(earliest_date) from corrections
where right_at is null and reset_at is null
group by security_id;

-- The definition of provisional, for all who tell readers: a date of a key is provisional from provisional_from on. That is
-- the date after its watermark, or the first one that a correction reaches which has not reset the key, whatever holds the
-- correction up. A correction reaches who held the security at the end of the business date before, or at any time after it.
create view key_finality as
    select s.security_id, s.portfolio_id, s.epoch, s.watermark_date, s.status, s.closed_on, s.reset_seq,
           r.job_id as resetting_job_id, r.reset_up_to,
           least(s.watermark_date + 1,
                 case when s.closed_on is null or s.closed_on > r.whole_since then r.whole_from end,
                 case when s.portfolio_id > r.reset_up_to and (s.closed_on is null or s.closed_on > r.part_since)
                      then r.part_from end) as provisional_from
    from position_state s
    left join (
        select reach.*,
               coalesce((select j.cursor_portfolio_id from reprocessing_jobs j where j.job_id = reach.job_id), '')
                   as reset_up_to,
               coalesce((select max(d.business_date) from business_dates d where d.business_date < whole_from),
                        '-infinity') as whole_since,
               coalesce((select max(d.business_date) from business_dates d where d.business_date < part_from),
                        '-infinity') as part_since
        from reach
    ) as r using (security_id);

-- A key is dirty when something up to L is provisional: dates after its watermark that the valuation still has to look at
-- (as sinks/holders.py says whose: a closed position has none), or dates that a correction reaches.
create or replace view dirty_keys as
    select k.portfolio_id, k.security_id, k.watermark_date, k.status, k.provisional_from
    from key_finality k
    where k.provisional_from <= (select max(business_date) from business_dates)
      and (k.provisional_from <= k.watermark_date
           or k.status = 'REPROCESSING' or k.closed_on is null or k.closed_on > k.watermark_date
           or k.closed_on > coalesce(
               (select max(d.business_date) from business_dates d where d.business_date <= k.watermark_date),
               '-infinity'));

-- provisional_since_seq: the oldest correction that the date waits for; null where it waits for none, but for the valuation
-- of a date that was closed lately or of a new transaction. It is looked for only where a query names the column.
create or replace view current_valuations as
    select v.portfolio_id, v.security_id, v.valuation_date, v.epoch, v.quantity, v.cost_basis, v.price, v.price_date,
           v.market_value, v.unrealized_gain_loss, v.valuation_status, k.watermark_date, k.status,
           v.valuation_date >= k.provisional_from as provisional, k.provisional_from,
           case when v.valuation_date >= k.provisional_from then least(
               case when v.valuation_date > k.watermark_date then k.reset_seq end,
               (select min(c.seq) from corrections c
                where c.security_id = v.security_id and c.right_at is null and c.reset_at is null
                  and c.earliest_date <= v.valuation_date
                  and (c.job_id is distinct from k.resetting_job_id or v.portfolio_id > k.reset_up_to)
                  and (k.closed_on is null or k.closed_on > coalesce(
                      (select max(d.business_date) from business_dates d where d.business_date < c.earliest_date),
                      '-infinity')))) end as provisional_since_seq
    from daily_position_snapshots v
    join key_finality k using (security_id, portfolio_id);

-- What valuations changed of what the books had said, for the correction that the keys waited for; of several, the oldest.
-- Passes append. When the correction is right, the rows are summed into its own and removed.
create table correction_changes (
    seq             bigint  not null,
    snapshots       bigint  not null,
    absolute_change numeric not null,  -- of market values; one that is null counts as nothing
    from_date       date    not null,
    to_date         date    not null
);
create index correction_changes_by_seq on correction_changes (seq);
alter table corrections
    add column snapshots_changed bigint,
    add column absolute_change   numeric,
    add column changed_from      date,
    add column changed_to        date;

-- What the books had said and then said of the largest changes, on the first date of each: kept as it was, whatever comes.
create table correction_values (
    seq                 bigint  not null,
    security_id         text collate "C" not null,
    portfolio_id        text collate "C" not null,
    valuation_date      date    not null,
    quantity            numeric not null,
    market_value_before numeric,  -- null: the books had said nothing, or had no price
    market_value_after  numeric,
    primary key (seq, security_id, portfolio_id)
);
