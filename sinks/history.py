"""Rows of `position_history`: writing them with their cost states, and reading back what a booking starts from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date, datetime
from decimal import Decimal
from itertools import islice

import asyncpg
import msgspec

from sinks import rows
from sinks.booking import Base, Booking, Key, Order
from sinks.costing import CostState, Entry, Lot, rounded
from sinks.database import Connection

_ROWS_AT_ONCE = 50_000  # bounds the memory that a statement's arguments take

BASE_COLUMNS = """
    h.sequence, h.transaction_date, h.transaction_id, h.quantity,
    coalesce(h.exact_cost_basis, h.cost_basis) as cost_basis,
    coalesce(h.exact_realized, h.realized_gain_loss) as realized, h.head_sequence, h.head_quantity, h.head_cost,
    h.recorded_at
"""

# Backwards from the end of the place's date: what it passes over is to be written anew anyway.
_BASES = f"""
select place.security_id, place.portfolio_id, base.*
from unnest($1::text[], $2::text[], $3::timestamptz[], $4::text[])
    as place (security_id, portfolio_id, transaction_date, transaction_id)
cross join lateral (
    select {BASE_COLUMNS} from position_history h
    where h.security_id = place.security_id and h.portfolio_id = place.portfolio_id and h.superseded_epoch is null
      and h.position_date <= (place.transaction_date at time zone 'UTC')::date
      and (h.transaction_date, h.transaction_id) < (place.transaction_date, place.transaction_id)
    order by h.position_date desc, h.sequence desc
    limit 1
) as base
"""

# The function serves workers of the version before as well, to whom it gives the splits that they have written.
_LOTS = """
select wanted.security_id, wanted.portfolio_id, found.sequence, found.lot_quantity, found.lot_cost
from unnest($1::text[], $2::text[], $3::int[], $4::int[], $5::numeric[])
    as wanted (security_id, portfolio_id, after, upto, needed)
cross join lateral open_lots(wanted.security_id, wanted.portfolio_id, after, upto, needed) as found
"""

_SUPERSEDE = """
update position_history h set superseded_at = $5, superseded_epoch = new.epoch
from unnest($1::text[], $2::text[], $3::int[], $4::int[]) as new (security_id, portfolio_id, epoch, kept)
where h.security_id = new.security_id and h.portfolio_id = new.portfolio_id
  and h.superseded_epoch is null and h.sequence > new.kept
"""


class _Row(msgspec.Struct, frozen=True, gc=False):
    """A row to be written, recorded_at left out. head_sequence 0: no lot is open. Marks are True or None."""

    security_id: str
    portfolio_id: str
    epoch: int
    sequence: int
    transaction_id: str
    transaction_date: datetime
    position_date: date
    quantity: Decimal
    cost_basis: Decimal
    realized_gain_loss: Decimal
    exact_cost_basis: Decimal | None
    exact_realized: Decimal | None
    head_sequence: int
    head_quantity: Decimal | None
    head_cost: Decimal | None
    lot_quantity: Decimal | None
    lot_cost: Decimal | None
    joins_lot: bool | None
    restates_lots: bool | None
    out_of_range: bool | None


_COLUMNS = ", ".join(_Row.__struct_fields__)

_WRITE = f"""
insert into position_history ({_COLUMNS}, recorded_at)
select {_COLUMNS}, $2::timestamptz
from json_to_recordset($1::json) as row (
    security_id text, portfolio_id text, epoch int, sequence int, transaction_id text, transaction_date timestamptz,
    position_date date, quantity numeric, cost_basis numeric, realized_gain_loss numeric, exact_cost_basis numeric,
    exact_realized numeric, head_sequence int, head_quantity numeric, head_cost numeric, lot_quantity numeric,
    lot_cost numeric, joins_lot boolean, restates_lots boolean, out_of_range boolean)
"""

_RESTATE = """
insert into lots_after_split (security_id, portfolio_id, split_sequence, epoch, sequence, quantity, cost)
select security_id, portfolio_id, split_sequence, epoch, sequence, quantity, cost
from json_to_recordset($1::json) as row (
    security_id text, portfolio_id text, split_sequence int, epoch int, sequence int, quantity numeric, cost numeric)
"""


class _Restated(msgspec.Struct, frozen=True, gc=False):
    """A lot behind the head, as a split leaves it."""

    security_id: str
    portfolio_id: str
    split_sequence: int
    epoch: int
    sequence: int
    quantity: Decimal
    cost: Decimal


def base(row: asyncpg.Record) -> Base:
    """The row of history in BASE_COLUMNS."""
    head = Lot(row["head_sequence"], row["head_quantity"], row["head_cost"]) if row["head_sequence"] else None
    state = CostState(row["quantity"], row["cost_basis"], row["realized"], head)
    order = (row["transaction_date"], row["transaction_id"].encode())
    return Base(row["sequence"], order, None if row["head_sequence"] is None else state)


async def read_bases(connection: Connection, places: dict[Key, Order]) -> dict[Key, Base]:
    """The last row of each key's live history before a place; keys without such a row are left out."""
    arguments = [(*key, order[0], order[1].decode()) for key, order in places.items()]
    found = await connection.fetch(_BASES, *columns(arguments))
    return {(row["security_id"], row["portfolio_id"]): base(row) for row in found}


async def read_lots(
    connection: Connection, wanted: Sequence[tuple[str, str, int, int, object]]
) -> dict[Key, list[Lot]]:
    """The open lots after one row up to another, as many as make up the units (costing.units_needed).

    wanted: (security_id, portfolio_id, after, upto, units).
    """
    found: dict[Key, list[Lot]] = {}
    for security, portfolio, sequence, quantity, cost in await connection.fetch(_LOTS, *columns(wanted)):
        found.setdefault((security, portfolio), []).append(Lot(sequence, quantity, cost))
    return found


async def write(connection: Connection, bookings: Sequence[Booking], at: datetime) -> None:
    """Supersede what a rebuild does not keep, and add the new rows. All carry one time, `at`."""
    rebuilt = [b.plan for b in bookings if b.plan.rebuilt_from and not b.plan.continues]
    if rebuilt:
        await connection.execute(_SUPERSEDE, *columns([(*p.key, p.epoch, p.kept) for p in rebuilt]), at)
    pieces = (_row(booked, entry) for booked in bookings for entry in booked.entries)
    while piece := list(islice(pieces, _ROWS_AT_ONCE)):
        await connection.execute(_WRITE, rows.encode(piece), at)
    restated = (
        _Restated(*booked.plan.key, entry.sequence, booked.plan.epoch, lot.sequence, lot.quantity, lot.cost)
        for booked in bookings
        for entry in booked.entries
        for lot in entry.restated
    )
    while lots := list(islice(restated, _ROWS_AT_ONCE)):
        await connection.execute(_RESTATE, rows.encode(lots))


def _row(booked: Booking, entry: Entry) -> _Row:
    state, transaction, head, lot = entry.state, entry.transaction, entry.state.head, entry.opened
    security_id, portfolio_id = booked.plan.key
    cost_basis, realized = rounded(state.cost_basis), rounded(state.realized)
    return _Row(
        security_id=security_id,
        portfolio_id=portfolio_id,
        epoch=booked.plan.epoch,
        sequence=entry.sequence,
        transaction_id=transaction.transaction_id,
        transaction_date=transaction.transaction_date,
        position_date=transaction.position_date,
        quantity=rounded(state.quantity),
        cost_basis=cost_basis,
        realized_gain_loss=realized,
        exact_cost_basis=None if state.cost_basis == cost_basis else state.cost_basis,
        exact_realized=None if state.realized == realized else state.realized,
        head_sequence=head.sequence if head else 0,
        head_quantity=head.quantity if head else None,
        head_cost=head.cost if head else None,
        lot_quantity=lot.quantity if lot else None,
        lot_cost=lot.cost if lot else None,
        joins_lot=True if lot and not lot.quantity else None,
        restates_lots=True if entry.restated else None,
        out_of_range=entry.out_of_range or None,
    )


def key_columns(keys: Iterable[Key]) -> tuple[list[str], list[str]]:
    """Keys as two columns of arguments."""
    pairs = list(keys)
    return [security for security, _ in pairs], [portfolio for _, portfolio in pairs]


def columns(tuples: Sequence[tuple[object, ...]]) -> list[list[object]]:
    """Rows as columns of arguments; there must be one."""
    return [list(column) for column in zip(*tuples, strict=True)]
