"""A witness inside Postgres: what each transaction did to offsets and rows, and what must hold at every moment.

The stream of transactions that a chaos run sends has no id twice, so each offset must store exactly one row, in the
transaction that moves the offset past it.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

import asyncpg

from sinks.database import connect, is_transient

_INSTALL = """
create table witness_offsets (
    id bigint generated always as identity, txid xid8 not null default pg_current_xact_id(), topic text, partition int,
    old_offset bigint, new_offset bigint, epoch bigint);
create table witness_rows (txid xid8 not null default pg_current_xact_id(), stored bigint);
create table witness_regressions (what text, detail text);

create function witness_offset() returns trigger language plpgsql as $$ begin
    if new.next_offset <> old.next_offset then
        insert into witness_offsets (topic, partition, old_offset, new_offset, epoch)
        values (new.topic, new.partition, old.next_offset, new.next_offset, new.epoch);
    end if;
    if new.next_offset < old.next_offset or new.epoch < old.epoch then
        insert into witness_regressions values ('offset', format('%s -> %s', old, new));
    end if;
    return null;
end $$;
create trigger witness after update on kafka_offsets for each row execute function witness_offset();

create function witness_stored() returns trigger language plpgsql as $$ begin
    insert into witness_rows (stored) select count(*) from stored;
    return null;
end $$;
create trigger witness after insert on transactions referencing new table as stored
    for each statement execute function witness_stored();

create function witness_key() returns trigger language plpgsql as $$ begin
    if new.epoch < old.epoch or new.epoch > old.epoch + 1 then
        insert into witness_regressions values ('epoch', format('%s -> %s', old, new));
    end if;
    return null;
end $$;
create trigger witness after update of epoch on position_state for each row execute function witness_key();
"""

# One statement is one snapshot: offsets and effects must agree in it.
_AGREE = """
select (select coalesce(sum(new_offset - old_offset), 0) from witness_offsets
        where topic like '%transactions') as passed,
       (select coalesce(sum(stored), 0) from witness_rows) as stored,
       (select count(*) from transactions) as rows,
       (select count(*) from witness_regressions) as regressions
"""

_TWICE_OR_NEVER = """
select o.txid, o.topic, o.partition, o.old_offset, o.new_offset, coalesce(r.stored, 0) as stored
from (select *, lag(new_offset, 1, 0) over (partition by topic, partition order by id) as expected
      from witness_offsets where topic like '%transactions') as o
left join (select txid, sum(stored) as stored from witness_rows group by 1) as r using (txid)
where o.expected <> o.old_offset or o.new_offset - o.old_offset <> coalesce(r.stored, 0)
limit 10
"""


@dataclass
class Witness:
    """Watches a database while faults happen."""

    dsn: str
    samples: int = 0
    disagreements: list[str] = field(default_factory=list)

    async def install(self) -> None:
        """Before the first worker starts."""
        connection = await connect(self.dsn)
        await connection.execute(_INSTALL)
        await connection.close()

    async def watch(self) -> None:
        """Sample until cancelled; Postgres may go away meanwhile."""
        while True:
            try:
                await self._sample_on(await connect(self.dsn))
            except Exception as error:
                if not is_transient(error):
                    raise
            await asyncio.sleep(0.1)

    async def _sample_on(self, connection: asyncpg.Connection) -> None:
        try:
            while True:
                row = await connection.fetchrow(_AGREE)
                self.samples += 1
                if not row["passed"] == row["stored"] == row["rows"] or row["regressions"]:
                    self.disagreements.append(str(dict(row)))
                await asyncio.sleep(0.05)
        finally:
            with contextlib.suppress(Exception):
                await connection.close(timeout=2)

    async def verdict(self) -> list[str]:
        """Every way in which exactly-once was broken; empty when it was kept."""
        connection = await connect(self.dsn)
        try:
            wrong = [str(dict(row)) for row in await connection.fetch(_TWICE_OR_NEVER)]
            wrong += [str(dict(row)) for row in await connection.fetch("select * from witness_regressions limit 10")]
        finally:
            await connection.close()
        return [*self.disagreements[:10], *wrong]
