"""What must be provisional, from the stored inputs and the ledger, row by row: the definition in words, written out.

A date of a key is provisional if it lies above the key's watermark, or if a correction that is not reset yet reaches
the key at or before it. Beside it, what is wrong: the oracle's rows against the stored ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import asyncpg

from tidemark.oracle import Key, Method, Price, SnapshotRow, Transaction, compute_books

_SNAPSHOTS = """
select portfolio_id, security_id, valuation_date, quantity, cost_basis, price, price_date, market_value,
       unrealized_gain_loss, valuation_status, provisional, provisional_since_seq
from current_valuations
"""
_CORRECTIONS = """
select c.seq, c.security_id, c.earliest_date, c.job_id, c.held, coalesce(j.cursor_portfolio_id, '') as cursor,
       coalesce(j.status, 'NO JOB') as job_status
from corrections c left join reprocessing_jobs j using (job_id)
where c.right_at is null and c.reset_at is null
"""
_TRANSACTIONS = """
select transaction_id, portfolio_id, security_id, transaction_date, transaction_type, quantity,
       gross_transaction_amount, trade_fee, cancelled
from transactions
"""


@dataclass
class Moment:
    """The books at one moment, by key and closed date. told: what readers are told; demanded: the definition.

    ambiguous: the keys of securities where two jobs have left corrections behind; the books may tell more there.
    """

    told: dict[tuple[Key, date], bool] = field(default_factory=dict)
    demanded: dict[tuple[Key, date], bool] = field(default_factory=dict)
    wrong: dict[tuple[Key, date], str] = field(default_factory=dict)
    since: dict[tuple[Key, date], int | None] = field(default_factory=dict)
    rows_told: dict[tuple[Key, date], bool] = field(default_factory=dict)
    ambiguous: set[Key] = field(default_factory=set)
    dirty: set[Key] = field(default_factory=set)
    states: set[str] = field(default_factory=set)


async def look(connection: asyncpg.Connection, method: Method) -> Moment:
    """Everything from one snapshot of the database."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        calendar = sorted(row[0] for row in await connection.fetch("select business_date from business_dates"))
        keys = await connection.fetch("select * from key_finality")
        ledger = await connection.fetch(_CORRECTIONS)
        snapshots = await connection.fetch(_SNAPSHOTS)
        dirty = await connection.fetch("select portfolio_id, security_id from dirty_keys")
        transactions = [Transaction(*row) for row in await connection.fetch(_TRANSACTIONS)]
        prices = [
            Price(*row) for row in await connection.fetch("select security_id, price_date, price from market_prices")
        ]
    books = compute_books(transactions, prices, calendar, method)
    stored = {((row[0], row[1]), row[2]): row for row in snapshots}
    found = Moment(dirty={(row[0], row[1]) for row in dirty})
    for state in keys:
        key = (state["portfolio_id"], state["security_id"])
        of_security = [c for c in ledger if c["security_id"] == key[1]]
        reaching = [c for c in of_security if reaches(c, state, calendar)]
        if len({c["job_id"] for c in of_security if c["job_id"] is not None}) > 1:
            found.ambiguous.add(key)
        expected = {row.valuation_date: row for row in books.snapshots.get(key, [])}
        for day in calendar:
            place = (key, day)
            causes = [c for c in reaching if c["earliest_date"] <= day]
            found.told[place] = day >= state["provisional_from"]
            found.demanded[place] = day > state["watermark_date"] or bool(causes)
            row = stored.get(place)
            if row is not None:
                found.rows_told[place], found.since[place] = row["provisional"], row["provisional_since_seq"]
            have = SnapshotRow(*list(row)[2:10]) if row is not None else None
            if have != expected.get(day):
                found.wrong[place] = f"{have}, where {expected.get(day)} is right"
                found.states |= {_state(c) for c in causes}
    return found


def reaches(correction: Mapping[str, Any], state: Mapping[str, Any], calendar: list[date]) -> bool:
    """The job has passed the keys up to its cursor; who closed before the business date before is not concerned."""
    before = max((day for day in calendar if day < correction["earliest_date"]), default=date.min)
    is_concerned = state["closed_on"] is None or state["closed_on"] > before
    return is_concerned and state["portfolio_id"] > correction["cursor"]


def _state(correction: Mapping[str, Any]) -> str:
    return correction["job_status"] + (" midway" if correction["cursor"] else "")
