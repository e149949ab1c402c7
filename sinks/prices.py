"""The price sink: store prices; every late one issues a correction. O(1) in holders (design, Price sink)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sinks import calendar, corrections, rows
from sinks.corrections import Debounce
from sinks.database import Connection
from sinks.model import Price

_UPSERT = """
with incoming as (
    select * from json_to_recordset($1::json)
        as incoming (security_id text, price_date date, price numeric, currency text, revision bigint)
    order by security_id collate "C", price_date
), stored as (
    insert into market_prices as stored (security_id, price_date, price, currency, revision)
    select * from incoming
    on conflict (security_id, price_date) do update
        set price = excluded.price, currency = excluded.currency, revision = excluded.revision,
            price_before = stored.price
        where excluded.revision >= stored.revision
    returning security_id, price_date, price_before, price as price_after
)
select all_of_them.stored, late.*
from (select count(*) as stored from stored) as all_of_them
left join stored as late on price_date <= $2 and price_before is distinct from price_after
"""

_REMEMBER = """
insert into corrected_prices (seq, price_date, price_before, price_after)
select * from unnest($1::bigint[], $2::date[], $3::numeric[], $4::numeric[])
"""


@dataclass(frozen=True, slots=True)
class PriceOutcome:
    """Prices stored, records ignored for a lower revision (in the batch or in the table), corrections by security."""

    stored: int
    ignored: int
    corrections: Mapping[str, int] = field(default_factory=dict)


def winners(prices: Iterable[Price]) -> list[Price]:
    """The one price per (security, date) that counts: the highest revision; of equal ones the later (contract)."""
    best: dict[tuple[str, object], Price] = {}
    for price in prices:
        identity = (price.security_id, price.price_date)
        if identity not in best or price.revision >= best[identity].revision:
            best[identity] = price
    return list(best.values())


async def apply(connection: Connection, prices: Sequence[Price], debounce: Debounce | None = None) -> PriceOutcome:
    """Store the batch; one correction per security with a changed value up to L, from the earliest such date."""
    await calendar.lock_shared(connection)
    latest = await calendar.latest_closed(connection)
    best = winners(prices)
    found = await connection.fetch(_UPSERT, rows.encode(best), latest)
    late = [row for row in found if row["security_id"] is not None]
    earliest = {r["security_id"]: r["price_date"] for r in sorted(late, key=lambda r: r["price_date"], reverse=True)}
    issued = await corrections.issue(connection, list(earliest.items()), "price", debounce)
    if late:
        await connection.execute(
            _REMEMBER,
            [issued[r["security_id"]] for r in late],
            [r["price_date"] for r in late],
            [r["price_before"] for r in late],
            [r["price_after"] for r in late],
        )
    stored = found[0]["stored"]
    return PriceOutcome(stored, len(prices) - stored, issued)
