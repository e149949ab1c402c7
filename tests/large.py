"""Books of 1,100,000 keys: 10,000 securities with 100 holders each and GIANT with 100,000, all of them valued.

Keys lie in the table as custodians deliver them, portfolio by portfolio, so no two of a security are neighbours; those
of GIANT lie together. LONG has one holder, with ten transactions a day for years.
"""

from __future__ import annotations

from datetime import date

from sinks.database import connect, migrate
from tests.gate import open_gate

SECURITIES, HOLDERS, OF_GIANT, IN_LONG = 10_000, 100, 100_000, 20_000
LAST = date(2025, 1, 30)
LATE = date(2025, 1, 20)
OPEN = 20_000
"""Open corrections, two for each security but LONG and GIANT (the last), which have one; as many are right."""


def security(number: int) -> str:
    """From 1 on, in their order."""
    return f"S{number:05}"


def portfolio(number: int) -> str:
    """From 1 on, in their order."""
    return f"P{number:06}"


# Large tables are filled without their indexes, and without a log.
_TABLES = ("market_prices", "position_state", "transactions", "position_history", "daily_position_snapshots")

_INDEXES = """
select table_.relname as table_name, index_.relname as index_name, k.conname as constraint_name, coalesce(
    'alter table ' || table_.relname || ' add constraint ' || k.conname || ' ' || pg_get_constraintdef(k.oid),
    pg_get_indexdef(i.indexrelid)) as definition
from pg_index i join pg_class table_ on table_.oid = i.indrelid join pg_class index_ on index_.oid = i.indexrelid
left join pg_constraint k on k.conindid = i.indexrelid
where i.indrelid = any($1::text[]::regclass[])
"""

_FILL = f"""
insert into business_dates
    select d::date from generate_series(date '{LAST}' - 29, date '{LAST}', '1 day') d;
insert into securities
    select 'S' || lpad(n::text, 5, '0'), date '{LAST}' from generate_series(1, {SECURITIES}) n
    union all select 'GIANT', date '{LAST}' union all select 'LONG', date '{LAST}';
insert into market_prices
    select security_id, business_date, 20, 'USD', 0 from securities cross join business_dates;
insert into position_state (security_id, portfolio_id, watermark_date)
    select 'S' || lpad(n::text, 5, '0'), 'P' || lpad(p::text, 6, '0'), date '{LAST}'
    from generate_series(1, {SECURITIES}) n cross join generate_series(1, {HOLDERS}) p order by p, n;
insert into position_state (security_id, portfolio_id, watermark_date)
    select 'GIANT', 'P' || lpad(p::text, 6, '0'), date '{LAST}' from generate_series(1, {OF_GIANT}) p;
insert into position_history (security_id, portfolio_id, epoch, sequence, transaction_id, transaction_date,
                              position_date, quantity, cost_basis, realized_gain_loss, head_sequence, head_quantity,
                              head_cost, lot_quantity, lot_cost)
    select security_id, portfolio_id, 0, 1, security_id || portfolio_id, '2025-01-10 10:00Z', '2025-01-10', 10, 100, 0,
           1, 10, 100, 10, 100
    from position_state;
"""

# Of some keys only, for the sake of time: GIANT's and those of the first 2,000 or 500 securities.
_FILL_PARTS = f"""
insert into transactions
    select security_id || portfolio_id, portfolio_id, security_id, '2025-01-10 10:00Z', 'BUY', 10, 10, 100, 0, 'USD',
           0, false
    from position_state where security_id <= 'S02000';
insert into position_state (security_id, portfolio_id, watermark_date) values ('LONG', 'P000001', date '{LAST}');
create temp view long_life as
    select n, day, day + interval '10 h' + (n - 1) % 10 * interval '1 min' as moment
    from (select n, date '{LAST}' - ({IN_LONG} - n) / 10 as day from generate_series(1, {IN_LONG}) n) as days;
insert into transactions
    select 'L' || n, 'P000001', 'LONG', moment, 'BUY', 1, 10, 10, 0, 'USD', 0, false from long_life;
insert into position_history (security_id, portfolio_id, epoch, sequence, transaction_id, transaction_date,
                              position_date, quantity, cost_basis, realized_gain_loss, head_sequence, head_quantity,
                              head_cost, lot_quantity, lot_cost)
    select 'LONG', 'P000001', 0, n, 'L' || n, moment, day, n, 10 * n, 0, 1, 1, 10, 1, 10 from long_life;
insert into daily_position_snapshots
    select security_id, portfolio_id, d, 0, 10, 100, 20, d, 200, 100, 'VALUED_CURRENT'
    from position_state cross join generate_series(date '{LAST}' - 2, date '{LAST}', '1 day') d
    where security_id <= 'S00500';
insert into position_history (security_id, portfolio_id, epoch, sequence, transaction_id, position_date, quantity,
                              cost_basis, realized_gain_loss, superseded_at, superseded_epoch)
    select 'GIANT', 'P' || lpad(n::text, 6, '0'), 0, 2, 'C' || n, '2025-01-11', 20, 200, 0,
           timestamptz '2025-02-01' + n * interval '1 s', 1
    from generate_series(1, 20000) n;
"""

_FILL_LEDGER = f"""
insert into kafka_offsets
    select 'group' || g, 'topic' || t, p, 1000, 1
    from generate_series(1, 3) g, generate_series(1, 10) t, generate_series(0, 99) p;
insert into corrections (seq, security_id, earliest_date, reason, issued_at, job_id, reset_at, right_at)
    select n, 'S' || lpad((1 + n % {SECURITIES})::text, 5, '0'), date '{LATE}', 'price', now() - interval '40 days', n,
           now() - interval '40 days', now() - interval '40 days'
    from generate_series(1, {OPEN}) n;
insert into reprocessing_jobs (job_id, security_id, earliest_impacted_date, seq, status, created_at, finished_at,
                               keys_total, keys_done)
    select seq, security_id, earliest_date, seq, 'COMPLETE', issued_at, issued_at, {HOLDERS}, {HOLDERS}
    from corrections;
insert into outbox_events (topic, message_key, value)
    select 'position-valuations', convert_to('K' || n, 'UTF8'), convert_to(repeat('x', 300), 'UTF8')
    from generate_series(1, 30000) n;
"""

# The herd comes after the statistics were taken, as it does: they say that every correction is right.
_HERD = f"""
insert into corrections (seq, security_id, earliest_date, reason, job_id, reissue_at)
    select {OPEN} + n,
           case {OPEN} - n when 0 then 'GIANT' when 1 then 'LONG'
                else 'S' || lpad((1 + n % {SECURITIES})::text, 5, '0') end,
           date '{LATE}', 'price', {OPEN} + n, 'infinity'
    from generate_series(1, {OPEN}) n;
insert into reprocessing_jobs (job_id, security_id, earliest_impacted_date, seq, status, created_at, keys_total)
    select seq, security_id, earliest_date, seq, 'PENDING', issued_at,
           case security_id when 'GIANT' then {OF_GIANT} when 'LONG' then 1 else {HOLDERS} end
    from corrections where right_at is null;
select setval('correction_seq', 1000000);
"""


async def fill(dsn: str) -> None:
    """Migrate and fill an empty database. No autovacuum: what Postgres knows of the tables must not change."""
    await migrate(dsn)
    await open_gate(dsn)
    connection = await connect(dsn)
    for table in await connection.fetch("select tablename as name from pg_tables where schemaname = 'tidemark'"):
        await connection.execute(f"alter table {table['name']} set (autovacuum_enabled = false)")
    indexes = await connection.fetch(_INDEXES, _TABLES)
    for index in indexes:
        if index["constraint_name"]:
            await connection.execute(f"alter table {index['table_name']} drop constraint {index['constraint_name']}")
        else:
            await connection.execute(f"drop index {index['index_name']}")
    for table in _TABLES:
        await connection.execute(f"alter table {table} set unlogged")
    await connection.execute("set maintenance_work_mem = '256MB'; set work_mem = '128MB'")
    await connection.execute(_FILL + _FILL_PARTS + _FILL_LEDGER)
    for index in indexes:
        await connection.execute(index["definition"])
    await connection.execute("vacuum analyze")
    await connection.execute(_HERD)
    await connection.close()
