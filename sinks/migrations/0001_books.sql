-- The books and what keeps them right. Contract: docs/reference; lock order: docs/design.
-- Identifiers sort by the bytes of their UTF-8 (collation "C"), as semantics demands.
-- No index on position_state names a column that a reset or a valuation writes: those updates must stay HOT.

create function round_half_even(value numeric, places int) returns numeric
    language sql immutable strict parallel safe
    return case
        when abs(value - trunc(value, places)) = 5 * (10::numeric ^ (-places - 1))
             and mod(trunc(value * 10::numeric ^ places), 2) = 0
        then trunc(value, places)
        else round(value, places)
    end;

create table kafka_offsets (
    consumer_group text   not null,
    topic          text   not null,
    partition      int    not null,
    next_offset    bigint not null,
    epoch          bigint not null,
    primary key (consumer_group, topic, partition)
) with (fillfactor = 50);

create table business_dates (
    business_date date        primary key,
    closed_at     timestamptz not null default clock_timestamp()
);

create table market_prices (
    security_id text collate "C" not null,
    price_date  date    not null,
    price       numeric not null check (price > 0),
    currency    text    not null,
    revision    bigint  not null,
    primary key (security_id, price_date)
);

create table transactions (
    transaction_id           text collate "C" primary key,
    portfolio_id             text collate "C" not null,
    security_id              text collate "C" not null,
    transaction_date         timestamptz not null,
    transaction_type         text    not null,
    quantity                 numeric not null,
    price                    numeric not null,
    gross_transaction_amount numeric not null,
    trade_fee                numeric not null,
    currency                 text    not null,
    revision                 bigint  not null,
    cancelled                boolean not null
);
create index transactions_in_order on transactions (security_id, portfolio_id, transaction_date, transaction_id);

-- One row per security that has prices or positions. Locked last: whoever draws a correction's seq, publishes a
-- trigger or status, or moves valued_through holds it. valued_through is a lower bound on the watermarks of the
-- security's keys: a security is due for valuation while valued_through < L.
create table securities (
    security_id    text collate "C" primary key,
    valued_through date not null default '-infinity'
) with (fillfactor = 70);
create index securities_by_valued_through on securities (valued_through);

create table position_state (
    security_id    text collate "C" not null,
    portfolio_id   text collate "C" not null,
    epoch          int  not null default 0,
    watermark_date date not null,
    status         text not null default 'CURRENT' check (status in ('CURRENT', 'REPROCESSING')),
    reset_seq      bigint,
    primary key (security_id, portfolio_id)
) with (fillfactor = 80);

-- The running cost state after a key's last live transaction, so that an append reads no history. lots: a JSON array
-- of [quantity, cost] in decimal text, oldest first, never rounded (semantics: rounding only at the end).
create table cost_states (
    security_id        text collate "C" not null,
    portfolio_id       text collate "C" not null,
    sequence           int         not null,
    transaction_date   timestamptz not null,
    transaction_id     text collate "C" not null,
    realized_gain_loss text        not null,
    lots               text        not null,
    primary key (security_id, portfolio_id)
) with (fillfactor = 70);

create table position_history (
    security_id        text collate "C" not null,
    portfolio_id       text collate "C" not null,
    epoch              int         not null,
    sequence           int         not null,
    transaction_id     text collate "C" not null,
    position_date      date        not null,
    quantity           numeric     not null,
    cost_basis         numeric     not null,
    realized_gain_loss numeric     not null,
    recorded_at        timestamptz not null default clock_timestamp(),
    superseded_at      timestamptz,
    superseded_epoch   int,
    primary key (security_id, portfolio_id, epoch, sequence)
);
create unique index position_history_live on position_history (security_id, portfolio_id, sequence)
    where superseded_epoch is null;
create index position_history_live_by_date on position_history (security_id, portfolio_id, position_date, sequence)
    where superseded_epoch is null;

create table daily_position_snapshots (
    security_id          text collate "C" not null,
    portfolio_id         text collate "C" not null,
    valuation_date       date    not null,
    epoch                int     not null,
    quantity             numeric not null,
    cost_basis           numeric not null,
    price                numeric,
    price_date           date,
    market_value         numeric,
    unrealized_gain_loss numeric,
    valuation_status     text    not null check (valuation_status in ('VALUED_CURRENT', 'VALUED_STALE', 'UNVALUED')),
    primary key (security_id, portfolio_id, valuation_date)
) with (fillfactor = 60);

create sequence correction_seq;
create table corrections (
    seq            bigint      primary key,
    security_id    text collate "C" not null,
    earliest_date  date        not null,
    reason         text        not null,
    issued_at      timestamptz not null default clock_timestamp(),
    job_id         bigint,
    held           boolean     not null default false,
    reset_at       timestamptz,
    right_at       timestamptz,
    reissue_count  int         not null default 0,
    reissue_at     timestamptz not null default clock_timestamp() + interval '30 seconds'
);
create index corrections_open on corrections (security_id, seq) where right_at is null;

create table reprocessing_jobs (
    job_id                 bigint      primary key,
    job_type               text        not null default 'RESET_WATERMARKS',
    security_id            text collate "C" not null,
    earliest_impacted_date date        not null,
    seq                    bigint      not null,
    status                 text        not null
        check (status in ('PENDING', 'PROCESSING', 'COMPLETE', 'FAILED', 'CANCELLED')),
    attempt_count          int         not null default 0,
    failure_reason         text,
    keys_total             bigint,
    keys_done              bigint      not null default 0,
    cursor_portfolio_id    text collate "C" not null default '',
    created_at             timestamptz not null,
    started_at             timestamptz,
    finished_at            timestamptz
);
create index reprocessing_jobs_by_security on reprocessing_jobs (security_id, job_id);
create index reprocessing_jobs_open on reprocessing_jobs (job_id) where status in ('PENDING', 'PROCESSING');

-- Generic cell rate algorithm: one row, cluster-wide. tat: theoretical arrival time of the next row.
create table reset_limit (
    only_row        boolean     primary key default true check (only_row),
    rows_per_second double precision not null check (rows_per_second > 0),
    paused          boolean     not null default false,
    tat             timestamptz not null default clock_timestamp()
);

-- Everything that leaves Postgres. id is the event_id; per (topic, message_key) ids grow because the writer holds that
-- key's row lock when it draws them. A null value is a tombstone.
create table outbox_events (
    id          bigint      generated always as identity primary key,
    topic       text        not null,
    message_key bytea,
    value       bytea,
    headers     jsonb       not null default '{}',
    created_at  timestamptz not null default clock_timestamp()
);

create view current_positions as
    select portfolio_id, security_id, position_date, transaction_id, epoch, sequence,
           quantity, cost_basis, realized_gain_loss
    from (
        select h.*, row_number() over (
            partition by security_id, portfolio_id, position_date order by sequence desc) as from_last
        from position_history h
        where superseded_epoch is null
    ) last_of_date
    where from_last = 1;

-- A key is dirty when its own watermark is behind L, or when a correction that has not reset its holders yet still
-- has to reach it: it held the security at the end of the business date before, or moved on or after it.
create view dirty_keys as
    with latest as (select max(business_date) as business_date from business_dates)
    select s.portfolio_id, s.security_id, s.watermark_date
    from position_state s, latest
    where s.watermark_date < latest.business_date
       or exists (
            select from corrections c
            where c.security_id = s.security_id and c.right_at is null and c.reset_at is null
              and c.earliest_date <= latest.business_date
              and s.watermark_date >= c.earliest_date
              and (exists (
                       select from position_history h
                       where h.security_id = s.security_id and h.portfolio_id = s.portfolio_id
                         and h.superseded_epoch is null and h.position_date >= c.earliest_date)
                   or 0 <> (
                       select h.quantity from position_history h
                       where h.security_id = s.security_id and h.portfolio_id = s.portfolio_id
                         and h.superseded_epoch is null and h.position_date < c.earliest_date
                       order by h.position_date desc, h.sequence desc limit 1)));

create view current_valuations as
    select v.portfolio_id, v.security_id, v.valuation_date, v.epoch, v.quantity, v.cost_basis, v.price, v.price_date,
           v.market_value, v.unrealized_gain_loss, v.valuation_status, s.watermark_date, s.status
    from daily_position_snapshots v
    join position_state s using (security_id, portfolio_id);
