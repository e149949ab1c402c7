"""Whether snapshots partitioned by month would pay: the same statements on the table as it is, and on such a one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import asyncpg

from sinks.database import open_connection
from tests.bench.harness import Bench, Work, timed

_MONTHS = 12
_FIRST, _END = date(2025, 1, 1), date(2026, 1, 1)
_PLAIN, _PARTITIONED = "daily_position_snapshots", "public.monthly_snapshots"

_CREATE = f"""
create table {_PARTITIONED} (like {_PLAIN} including defaults including constraints)
    partition by range (valuation_date);
alter table {_PARTITIONED} add primary key (security_id, portfolio_id, valuation_date);
do $$ begin
    for month in 0 .. {_MONTHS - 1} loop
        execute format('create table public.monthly_snapshots_%s partition of {_PARTITIONED} '
                       'for values from (%L) to (%L) with (fillfactor = 60)', month,
                       date '{_FIRST}' + make_interval(months => month),
                       date '{_FIRST}' + make_interval(months => month + 1));
    end loop;
end $$;
"""
_DAY = """
insert into {} select 'S' || lpad((k % 1000)::text, 4, '0'), 'P' || lpad(k::text, 7, '0'), $1::date, 0, 10, 100, 20,
                      $1::date, 200, 100, 'VALUED_CURRENT'
from generate_series(1, $2::int) as k
"""
# As the valuation does: each key's dirty dates by the primary key, what differs is written.
_REVALUE = """
with computed as materialized (
    select s.security_id, s.portfolio_id, s.valuation_date, $4::numeric as price
    from (select distinct security_id, portfolio_id from {0}
          where security_id = $1 and valuation_date = $3::date) as key
    cross join lateral (
        select * from {0} s where s.security_id = key.security_id and s.portfolio_id = key.portfolio_id
          and s.valuation_date between $2::date and $3::date
        offset 0) as s
)
update {0} s set price = c.price, market_value = s.quantity * c.price,
                 unrealized_gain_loss = s.quantity * c.price - s.cost_basis
from computed c
where s.security_id = c.security_id and s.portfolio_id = c.portfolio_id and s.valuation_date = c.valuation_date
"""
_READ = "select * from {} where security_id = $1 and portfolio_id = $2 order by valuation_date"


async def run(bench: Bench) -> None:
    """Closing a date, revaluing 15 dates of a security, reading a position's year: partitioned beside plain."""
    keys, days = bench.size(50_000, 2_000), bench.size(60, 24)
    async with bench.database() as dsn, open_connection(dsn) as connection:
        await connection.execute(_CREATE)
        tables = [_Table(connection, name, keys, []) for name in (_PARTITIONED, _PLAIN)]
        for table in tables:
            await table.fill(days)
        partitioned, plain = tables
        for what in ("close", "revalue", "read"):
            await bench.compare(
                f"snapshots by month: {what}",
                "statements/s",
                partitioned.work(what),
                ("one table, as it is", plain.work(what)),
                note="1: it makes no difference",
            )


@dataclass
class _Table:
    connection: asyncpg.Connection
    name: str
    keys: int
    days: list[date]
    turn: int = 0

    async def fill(self, days: int) -> None:
        """So many dates, spread over the months."""
        step = (_END - _FIRST) // days
        self.days = [_FIRST + n * step for n in range(days)]
        for day in self.days:
            await self.connection.execute(_DAY.format(self.name), day, self.keys)
        await self.connection.execute(f"vacuum analyze {self.name}")

    def work(self, what: str) -> Work:
        async def once() -> float:
            self.turn += 1
            repeated = {"close": 1, "revalue": 20, "read": 200}[what]
            seconds = [await timed(self.connection.execute(*self._statement(what, n))) for n in range(repeated)]
            if what == "close":
                await self.connection.execute(f"delete from {self.name} where valuation_date = $1", self._free_day)
                await self.connection.execute(f"vacuum {self.name}")
            return repeated / sum(seconds)

        return once

    @property
    def _free_day(self) -> date:
        return date.fromordinal(self.days[-1].toordinal() + 1)

    def _statement(self, what: str, number: int) -> Sequence[object]:
        security = f"S{(self.turn * 31 + number) % 1000:04d}"
        if what == "close":
            return _DAY.format(self.name), self._free_day, self.keys
        if what == "revalue":
            return _REVALUE.format(self.name), security, self.days[-15], self.days[-1], self.turn + number
        return _READ.format(self.name), security, f"P{(self.turn * 31 + number) % 1000:07d}"
