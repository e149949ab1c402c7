"""A witness inside Postgres: what each transaction did to offsets and rows, and what must hold at every moment.

The load is such that every good price or transaction stores or replaces one row and every bad record leaves one dead
letter (`tests.chaos.load`): so each offset's effect can be counted, in the transaction that moves the offset past it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import asyncpg

from sinks.database import DatabaseError, connect, is_transient
from tidemark.audit import Scope, audit_books

Place = tuple[str, int, int]  # topic, partition, offset

_INSTALL = """
create table witness_offsets (
    id bigint generated always as identity, txid xid8 not null default pg_current_xact_id(), topic text, partition int,
    old_offset bigint, new_offset bigint, epoch bigint);
create table witness_effects (txid xid8 not null default pg_current_xact_id(), topic text, inserted int, replaced int);
create table witness_letters (
    txid xid8 not null default pg_current_xact_id(), topic text, partition int, record_offset bigint);
create table witness_outbox (id bigint, topic text, message_key bytea, repair boolean);
create table witness_lowered (txid xid8 not null default pg_current_xact_id(), detail text);
create table witness_regressions (what text, detail text);

-- Every fenced transaction updates its offset's row, even one that does not move it.
create function witness_offset() returns trigger language plpgsql as $$ begin
    if new.epoch = old.epoch then
        insert into witness_offsets (topic, partition, old_offset, new_offset, epoch)
        values (regexp_replace(new.topic, '^t[0-9a-f]{8}-', ''), new.partition, old.next_offset, new.next_offset,
                new.epoch);
    end if;
    if new.next_offset < old.next_offset or new.epoch < old.epoch then
        insert into witness_regressions values ('offset', format('%s -> %s', old, new));
    end if;
    return null;
end $$;
create trigger witness after update on kafka_offsets for each row execute function witness_offset();

create function witness_inserted() returns trigger language plpgsql as $$ begin
    insert into witness_effects (topic, inserted, replaced) select tg_argv[0], count(*), 0 from rows;
    return null;
end $$;
create function witness_replaced() returns trigger language plpgsql as $$ begin
    insert into witness_effects (topic, inserted, replaced) select tg_argv[0], 0, count(*) from rows;
    return null;
end $$;
create trigger witness_inserted after insert on transactions referencing new table as rows
    for each statement execute function witness_inserted('transactions');
create trigger witness_replaced after update on transactions referencing new table as rows
    for each statement execute function witness_replaced('transactions');
create trigger witness_inserted after insert on market_prices referencing new table as rows
    for each statement execute function witness_inserted('prices');
create trigger witness_replaced after update on market_prices referencing new table as rows
    for each statement execute function witness_replaced('prices');

create function witness_published() returns trigger language plpgsql as $$ begin
    insert into witness_outbox
    select id, topic, message_key,
           case when topic = 'reprocessing-triggers' then convert_from(value, 'UTF8')::jsonb ->> 'reason' = 'repair' end
    from rows;
    insert into witness_letters (topic, partition, record_offset)
    select headers ->> 'topic', (headers ->> 'partition')::int, (headers ->> 'offset')::bigint
    from rows where topic = 'dead-letters';
    return null;
end $$;
create trigger witness after insert on outbox_events referencing new table as rows
    for each statement execute function witness_published();

create function witness_key() returns trigger language plpgsql as $$ begin
    if new.epoch < old.epoch or new.epoch > old.epoch + 1 then
        insert into witness_regressions values ('epoch', format('%s -> %s', old, new));
    end if;
    if new.watermark_date < old.watermark_date then
        insert into witness_lowered (detail) values (format('%s -> %s', old, new));
    elsif new.watermark_date > old.watermark_date and (
        new.status <> 'CURRENT' or new.reset_seq is not null
        or not exists (select from business_dates where business_date = new.watermark_date)) then
        insert into witness_regressions values ('raised without a valuation', format('%s -> %s', old, new));
    end if;
    return null;
end $$;
create trigger witness after update on position_state for each row
    when (old.epoch <> new.epoch or old.watermark_date <> new.watermark_date) execute function witness_key();

create function witness_correction() returns trigger language plpgsql as $$ begin
    if tg_op = 'DELETE' then
        insert into witness_regressions values ('correction deleted', old::text);
    elsif old.reset_at is not null and new.reset_at is distinct from old.reset_at
       or old.right_at is not null and new.right_at is distinct from old.right_at
       or new.right_at is not null and new.reset_at is null then
        insert into witness_regressions values ('correction', format('%s -> %s', old, new));
    end if;
    return null;
end $$;
create trigger witness after update or delete on corrections for each row execute function witness_correction();

create function witness_job() returns trigger language plpgsql as $$ begin
    if tg_op = 'DELETE' then
        insert into witness_regressions values ('job deleted', old::text);
    elsif new.cursor_portfolio_id < old.cursor_portfolio_id or new.keys_done < old.keys_done
       or old.status in ('COMPLETE', 'FAILED', 'CANCELLED') and new is distinct from old then
        insert into witness_regressions values ('job', format('%s -> %s', old, new));
    end if;
    return null;
end $$;
create trigger witness after update or delete on reprocessing_jobs for each row execute function witness_job();

-- So that what the faults lose is triggered again within the run.
alter table corrections alter column reissue_at set default clock_timestamp() + interval '10 seconds';
"""

# One statement is one snapshot: offsets and effects must agree in it.
_AGREE = """
with passed as (
    select topic, sum(new_offset - old_offset)::bigint as passed from witness_offsets group by topic
), effects as (
    select topic, sum(inserted)::bigint as inserted, sum(inserted + replaced)::bigint as stored
    from witness_effects group by topic
), letters as (
    select topic, count(*) as letters from witness_letters group by topic
)
select t.topic, coalesce(p.passed, 0) as passed, coalesce(e.stored, 0) + coalesce(l.letters, 0) as effects,
       coalesce(e.inserted, 0) as inserted, t.rows, (select count(*) from witness_regressions) as regressions
from (values ('transactions', (select count(*) from transactions)), ('prices', (select count(*) from market_prices)))
    as t (topic, rows)
left join passed p using (topic) left join effects e using (topic) left join letters l using (topic)
"""

_OFFSETS_AGREE = """
select sum(next_offset)::bigint = (select coalesce(sum(new_offset - old_offset), 0) from witness_offsets)
from kafka_offsets
"""

# From which date on readers are told that a security's dates are provisional, and from which the ledger says so.
_REACH_DISAGREES = """
select security_id, said.first as said, ledger.first as ledger
from (select security_id, least(whole_from, part_from) as first from reach) as said
full join (
    select security_id, min(earliest_date) as first from corrections
    where right_at is null and reset_at is null group by security_id
) as ledger using (security_id)
where said.first is distinct from ledger.first
limit 3
"""

_NO_TILES = """
select 'offsets do not tile' as what, txid, topic, partition, expected, old_offset, new_offset
from (select *, lag(new_offset, 1, 0) over (partition by topic, partition order by id) as expected
      from witness_offsets) as o
where expected <> old_offset
limit 10
"""

_TWICE_OR_NEVER = """
select 'effects differ from offsets' as what, o.txid, o.topic, o.moved, coalesce(e.stored, 0) as stored,
       coalesce(l.letters, 0) as letters
from (select txid, topic, sum(new_offset - old_offset) as moved from witness_offsets
      where topic in ('transactions', 'prices') group by 1, 2) as o
full join (select txid, topic, sum(inserted + replaced) as stored from witness_effects group by 1, 2) as e
    using (txid, topic)
left join (select txid, topic, count(*) as letters from witness_letters group by 1, 2) as l using (txid, topic)
where coalesce(o.moved, 0) <> coalesce(e.stored, 0) + coalesce(l.letters, 0)
limit 10
"""

_UNFENCED = """
select 'watermark lowered outside a fenced transaction' as what, w.txid, w.detail from witness_lowered w
where not exists (select from witness_offsets o
                  where o.txid = w.txid and o.topic in ('transactions', 'reprocessing-jobs'))
limit 10
"""

_FIGURES = """
select (select count(*) from corrections) as corrections,
       (select count(*) from witness_outbox where repair) as repairs,
       (select count(*) from reprocessing_jobs) as jobs,
       (select count(*) from witness_lowered) as watermarks_lowered,
       (select count(*) from witness_outbox) as outbox_rows
"""


@dataclass
class Witness:
    """Watches a database while faults happen, from a thread of its own. dsn leads around the proxies."""

    dsn: str
    seed: int
    samples: int = 0
    audited: int = 0
    """Securities whose books were recomputed from one snapshot while the faults went on."""
    disagreements: list[str] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    async def install(self) -> None:
        """Before the first worker starts."""
        connection = await connect(self.dsn)
        await connection.execute(_INSTALL)
        await connection.close()

    def start(self) -> None:
        """Begin to sample."""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._watch()), daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """No more samples."""
        self._over.set()
        if self._thread:
            await asyncio.to_thread(self._thread.join)

    async def _watch(self) -> None:
        """Postgres may go away meanwhile."""
        chance = random.Random(self.seed)
        while not self._over.is_set():
            try:
                connection = await connect(self.dsn)
                try:
                    await self._sample(connection, chance)
                finally:
                    with contextlib.suppress(Exception):
                        await connection.close(timeout=2)
            except Exception as error:
                if not (is_transient(error) or isinstance(error, DatabaseError)):
                    self.disagreements.append(f"the witness failed: {type(error).__name__}: {error}")
                    return
            await asyncio.sleep(0.1)

    async def _sample(self, connection: asyncpg.Connection, chance: random.Random) -> None:
        audit_at = time.monotonic()
        while not self._over.is_set():
            for row in await connection.fetch(_AGREE):
                if row["passed"] != row["effects"] or row["inserted"] != row["rows"] or row["regressions"]:
                    self.disagreements.append(str(dict(row)))
            if await connection.fetchval(_OFFSETS_AGREE) is False:
                self.disagreements.append("offsets differ from the sum of their moves")
            for row in await connection.fetch(_REACH_DISAGREES):
                self.disagreements.append(f"reach differs from the ledger: {dict(row)}")
            self.samples += 1
            if time.monotonic() > audit_at:
                await self._audit()
                audit_at = time.monotonic() + 2
            await asyncio.sleep(0.2)

    async def _audit(self) -> None:
        """No snapshot told as final may differ from a recomputation of the same moment (key_finality, dirty_keys)."""
        result = await audit_books(self.dsn, "FIFO", scope=Scope(sample=50))
        self.audited += result.keys
        self.disagreements += [f"while faults went on: {difference}" for difference in result.differences[:3]]

    async def verdict(self, bad: Iterable[Place]) -> list[str]:
        """Every way in which exactly-once was broken; empty when it was kept. bad: where bad records were sent."""
        connection = await connect(self.dsn)
        try:
            wrong = []
            for query in (_NO_TILES, _TWICE_OR_NEVER, _UNFENCED, "select * from witness_regressions limit 10"):
                wrong += [str(dict(row)) for row in await connection.fetch(query)]
            letters = [
                (row["topic"], row["partition"], row["record_offset"])
                for row in await connection.fetch("select * from witness_letters")
            ]
        finally:
            await connection.close()
        if sorted(letters) != sorted(bad):
            wrong.append(f"{len(letters)} dead letters for {len(list(bad))} bad records, or for others")
        return [*self.disagreements[:10], *wrong]

    async def figures(self) -> dict[str, int]:
        """How much there was to go wrong."""
        connection = await connect(self.dsn)
        try:
            return dict(await connection.fetchrow(_FIGURES))
        finally:
            await connection.close()

    async def outbox(self) -> dict[int, tuple[str, bytes | None]]:
        """(topic, key) of every outbox row there ever was, by id."""
        connection = await connect(self.dsn)
        try:
            rows = await connection.fetch("select id, topic, message_key from witness_outbox order by id")
            return {row["id"]: (row["topic"], row["message_key"]) for row in rows}
        finally:
            await connection.close()
