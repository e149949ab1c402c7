"""What the valuation takes in hand next: keys of the securities that are due, page by page, at a place of its own.

Workers that all began at the head would each read past what the others hold: with forty claims open a claim read forty
times as much. So the first begins at the head, and each other in the middle of the largest gap that is left.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from datetime import date

import asyncpg

from sinks import holders
from sinks.database import Connection

SECURITIES_AT_ONCE = 1_000
_LOOKED_UP = 10_000  # securities of a queue
_SLOTS = 64
_LOCK = 0x7661_6C75  # "valu"

KEPT_FOR = 10.0
"""How many times as long as looking it up took a crowd's queues are kept, if they last that long: looking up passes
over all that is due, and before each transaction it would take a herd of 50,000 securities half of its time."""

# Two queues: what corrections wait for, by priority, oldest first; and what a newly closed date or a new transaction
# made due, longest behind first. Corrections are looked up security by security, whatever the statistics say: these lag
# behind a herd, and any other way of joining costs a product.
_DUE = """
with due as materialized (
    select d.security_id, d.valued_through, open.seq, open.priority
    from (select security_id, valued_through from securities where valued_through < $1 offset 0) as d
    left join lateral (
        select min(c.seq) as seq,
               max(coalesce((select priority from reprocessing_jobs j where j.job_id = c.job_id), 0)) as priority
        from corrections c
        where c.security_id = d.security_id and c.right_at is null and not c.held
        having count(*) > 0
    ) as open on true
)
select array(select security_id from due where seq is not null order by priority desc, seq limit $2) as corrected,
       array(select security_id from due where seq is null order by valued_through, security_id limit $2) as behind,
       (select count(*) from due where priority = (select max(priority) from due)) as first,
       (select slot from generate_series(0, $3::int - 1) as slot
        where pg_try_advisory_xact_lock($4, slot) limit 1) as slot
"""

# Where so large a part of all keys ends. Statistics may be old: it is a place to begin, and nothing is left out by it.
_PLACES = """
select histogram_bounds::text::text[] from pg_stats
where schemaname = current_schema() and tablename = 'position_state' and attname = 'portfolio_id'
"""

# Page by page in the order asked for, from each security's cursor on. It never waits, so the order of locks is free. A
# closed position has nothing to value (due is false), but its watermark moves on as well: one look finds both.
_CLAIM = f"""
select claimed.*
from unnest($1::text[], $2::text[]) as page (security_id, cursor)
cross join lateral (
    select s.security_id, s.portfolio_id, s.watermark_date, s.epoch, s.reset_seq, {holders.due("s", "$3::date")} as due
    from position_state s
    where s.security_id = page.security_id and s.portfolio_id > page.cursor and s.watermark_date < $3::date
    order by s.portfolio_id
    limit $4
    for no key update skip locked
) as claimed
limit $4
"""

# A plan for any claim is one for ten keys of one security; for two thousand of a thousand it is quadratic. Nor may a
# claim sort: each page of a giant would read all that is left of it. And nothing may read through a whole table. How
# many dates are dirty the planner cannot know: it takes a third of all, and would hash a few in files.
PLAN_FOR_THESE = """
set local plan_cache_mode = force_custom_plan;
set local enable_bitmapscan = off;
set local enable_seqscan = off;
set local work_mem = '32MB'
"""
"""SQL: for the rest of the transaction."""


class Claims:
    """Its state is only where claims ended: without it claiming is quadratic in a security's keys.

    And, of a crowd, the queues: else it would be quadratic in securities.
    """

    def __init__(self, keys: int) -> None:
        self.keys = keys
        self._cursors: dict[str, str] = {}
        self._halfway: set[str] = set()  # begun in the middle: what is before it comes afterwards
        self._queues: dict[str, list[str]] = {}
        self._queue: list[str] = []  # that the last page is of
        self._kept_until = 0.0
        self._turns = deque(["corrected", "behind"])  # in turn, so that neither starves the other

    def begin(self) -> None:
        """A new pass."""
        self._turns.rotate()
        if time.monotonic() >= self._kept_until:
            self._queues.clear()

    def next_page(self) -> list[str]:
        """The securities to claim from now; empty when the queues are."""
        self._queue = next(filter(None, map(self._queues.get, self._turns)), [])
        return self._queue[:SECURITIES_AT_ONCE]

    async def look_up(self, connection: Connection, latest: date) -> None:
        """Fill the queues with what is due before `latest`."""
        started = time.monotonic()
        row = await connection.fetchrow(_DUE, latest, _LOOKED_UP, _SLOTS, _LOCK)
        assert row is not None
        share = place(row["slot"] or 0)
        self._queues = {}
        for name, first in (("corrected", row["first"]), ("behind", len(row["behind"]))):
            self._queues[name], within = begun(row[name], min(first, len(row[name])), share)
            if within and self._queues[name][0] not in self._cursors:
                await self._begin_within(connection, self._queues[name][0], within)
        is_crowd = sum(map(len, self._queues.values())) > SECURITIES_AT_ONCE
        now = time.monotonic()
        self._kept_until = now + KEPT_FOR * (now - started) if is_crowd else now

    async def _begin_within(self, connection: Connection, security: str, share: float) -> None:
        bounds = await connection.fetchval(_PLACES)
        if bounds:
            self._cursors[security] = bounds[int(share * len(bounds))]
            self._halfway.add(security)

    async def claim(self, connection: Connection, page: Sequence[str], latest: date) -> list[asyncpg.Record]:
        """Lock the next keys of the page's securities whose watermark is before `latest`, up to `keys` of them."""
        cursors = [self._cursors.get(security, "") for security in page]
        claimed: list[asyncpg.Record] = await connection.fetch(_CLAIM, page, cursors, latest, self.keys)
        return claimed

    def passed(self, page: Sequence[str], claimed: Sequence[asyncpg.Record]) -> list[str]:
        """The page's securities gone through to their end, which leave the queue; a full claim ends within one."""
        if len(claimed) < self.keys:
            gone = list(page)
        else:
            last = claimed[-1]["security_id"]
            self._cursors[last] = claimed[-1]["portfolio_id"]
            gone = list(page[: page.index(last)])
        for security in gone:
            if security in self._halfway:
                self._halfway.discard(security)
                self._cursors[security] = ""
            else:
                self._cursors.pop(security, None)
        del self._queue[: len(gone)]
        return gone


def place(slot: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8 …: van der Corput's sequence, in which each next lies in the largest gap."""
    share, step = 0.0, 0.5
    while slot:
        slot, bit = divmod(slot, 2)
        share += bit * step
        step /= 2
    return share


def begun(queue: Sequence[str], first: int, share: float) -> tuple[list[str], float]:
    """The queue from so far into its `first` members on, those before after them, and the rest as it is.

    Where the members are few, the place lies within one: the share of that one comes second, else 0.
    """
    start, within = divmod(share * first, 1)
    index = int(start)
    return [*queue[index:first], *queue[:index], *queue[first:]], within if first < _SLOTS else 0.0
