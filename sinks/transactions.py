"""Storing transactions: latest revision by id, and what that changes in the keys' histories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from sinks import revisions, rows
from sinks.database import Connection
from sinks.model import Transaction

COLUMNS = (
    "transaction_id, portfolio_id, security_id, transaction_date, transaction_type, quantity, price, "
    "gross_transaction_amount, trade_fee, currency, revision, cancelled"
)

_ROWS = f"""
select {COLUMNS} from json_to_recordset($1::json) as row (
    transaction_id text, portfolio_id text, security_id text, transaction_date timestamptz, transaction_type text,
    quantity numeric, price numeric, gross_transaction_amount numeric, trade_fee numeric, currency text,
    revision bigint, cancelled boolean)
"""

_INSERT = f"""
insert into transactions ({COLUMNS}) {_ROWS}
on conflict do nothing
returning transaction_id
"""

_LOCK = f"select {COLUMNS} from transactions where transaction_id = any($1::text[]) order by transaction_id for update"

_REPLACE = f"""
update transactions set
    portfolio_id = new.portfolio_id, security_id = new.security_id, transaction_date = new.transaction_date,
    transaction_type = new.transaction_type, quantity = new.quantity, price = new.price,
    gross_transaction_amount = new.gross_transaction_amount, trade_fee = new.trade_fee, currency = new.currency,
    revision = new.revision, cancelled = new.cancelled
from ({_ROWS}) as new ({COLUMNS})
where transactions.transaction_id = new.transaction_id
"""

_FROM_PLACE = f"""
select following.* from unnest($1::text[], $2::text[], $3::timestamptz[], $4::text[], $5::int[])
    as place (security_id, portfolio_id, after_date, after_id, most)
cross join lateral (
    select {COLUMNS} from transactions t
    where t.security_id = place.security_id and t.portfolio_id = place.portfolio_id and not t.cancelled
      and (t.transaction_date, t.transaction_id) > (place.after_date, place.after_id)
    order by t.transaction_date, t.transaction_id
    limit place.most
) as following
order by security_id, portfolio_id, transaction_date, transaction_id
"""


@dataclass(frozen=True, slots=True)
class Change:
    """One transaction before (None: unknown) and after a batch."""

    old: Transaction | None
    new: Transaction


@dataclass(frozen=True, slots=True)
class Stored:
    """What changed; records ignored; conflicting duplicates, by record number, with what is wrong."""

    changes: list[Change]
    ignored: int
    conflicts: dict[int, str]


async def store(connection: Connection, numbered: Sequence[tuple[int, Transaction]]) -> Stored:
    """Keep the revision that counts of each transaction; takes row locks in the order of ids."""
    versions: dict[str, list[tuple[int, Transaction]]] = {}
    for number, transaction in numbered:
        versions.setdefault(transaction.transaction_id, []).append((number, transaction))
    ids = sorted(versions, key=str.encode)
    folded = {id_: revisions.fold(None, versions[id_]) for id_ in ids}
    first = [winner for id_ in ids if (winner := folded[id_].winner)]
    inserted = {row["transaction_id"] for row in await connection.fetch(_INSERT, rows.encode(first))}
    old: dict[str, Transaction] = {}
    if known := [id_ for id_ in ids if id_ not in inserted]:
        # A fresh statement: the insert may have waited for another writer of the same id.
        old = {row["transaction_id"]: from_row(row) for row in await connection.fetch(_LOCK, known)}
        folded |= {id_: revisions.fold(old[id_], versions[id_]) for id_ in known}
        replaced = [winner for id_ in known if (winner := folded[id_].winner)]
        if replaced:
            await connection.execute(_REPLACE, rows.encode(replaced))
    return Stored(
        [Change(old.get(id_), winner) for id_ in ids if (winner := folded[id_].winner)],
        sum(fold.ignored for fold in folded.values()),
        {number: detail for fold in folded.values() for number, detail in fold.conflicts.items()},
    )


async def read_from(
    connection: Connection, places: dict[tuple[str, str], tuple[datetime, bytes, int]]
) -> dict[tuple[str, str], list[Transaction]]:
    """The transactions that take part in each key's history behind a place, in the key's order.

    places: by (security_id, portfolio_id), the order of the last transaction not to be read, and how many to read.
    """
    found: dict[tuple[str, str], list[Transaction]] = {key: [] for key in places}
    stored = await connection.fetch(
        _FROM_PLACE,
        [security for security, _ in places],
        [portfolio for _, portfolio in places],
        [day for day, _, _ in places.values()],
        [id_.decode() for _, id_, _ in places.values()],
        [most for _, _, most in places.values()],
    )
    for row in stored:
        transaction = from_row(row)
        found[transaction.key].append(transaction)
    return found


def from_row(row: asyncpg.Record) -> Transaction:
    """The transaction in a row of COLUMNS."""
    return Transaction(*row.values())
