"""The sample data, and the scenarios other tests are made of."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from decimal import Decimal

from tests import scenarios
from tidemark.oracle import fold_inputs
from tidemark.sample import business_dates, generate_transactions, load_prices

DATES = business_dates()[-60:]


def test_prices_are_records_of_the_topic():
    prices = load_prices()
    assert {row["security_id"] for row in prices} == {"SP500", "NASDAQ", "WTI"}
    assert all(row.keys() == {"security_id", "price_date", "price", "currency"} for row in prices)
    assert all(Decimal(row["price"]) > 0 for row in prices)
    assert len({(row["security_id"], row["price_date"]) for row in prices}) == len(prices) == 750


def test_a_known_close():
    assert {
        "security_id": "SP500",
        "price_date": "2018-12-31",
        "price": "2506.85",
        "currency": "USD",
    } in load_prices()


def test_business_dates_are_weekdays_in_order():
    dates = business_dates()
    assert dates == sorted(set(dates))
    assert len(dates) == 251
    assert all(day.weekday() < 5 for day in dates)


def test_transactions_depend_on_the_seed_only():
    assert generate_transactions(1, 20, DATES) == generate_transactions(1, 20, DATES)
    assert generate_transactions(1, 20, DATES) != generate_transactions(2, 20, DATES)


def test_portfolios_are_realistic():
    records = generate_transactions(7, 200, DATES)
    assert len({record["transaction_id"] for record in records}) == len(records)
    kinds = Counter(record["transaction_type"] for record in records)
    assert kinds.keys() == {"BUY", "SELL", "DIVIDEND", "TRANSFER_IN", "TRANSFER_OUT", "SPLIT"}
    holders = defaultdict(set)
    for record in records:
        holders[record["security_id"]].add(record["portfolio_id"])
    assert len(holders["SP500"]) >= 190
    events = [("transactions", record) for record in records]
    events += [("business-dates", {"business_date": day.isoformat()}) for day in DATES]
    books = fold_inputs(events).books("FIFO")
    last = [rows[-1].quantity for rows in books.snapshots.values() if rows[-1].valuation_date == DATES[-1]]
    assert sum(quantity > 0 for quantity in last) > 400
    assert sum(quantity < 0 for quantity in last) > 5


def test_few_portfolios_and_few_dates_do():
    assert generate_transactions(1, 1, DATES[:2])
    assert generate_transactions(1, 2, DATES[:1])


def test_scenarios_are_seeded_json_and_large_enough():
    events = scenarios.generate(3)
    assert events == scenarios.generate(3)
    assert len(events) >= 2_500
    assert scenarios.counts(events).keys() == {"business-dates", "prices", "transactions"}
    read_back = [(topic, json.dumps(record)) for topic, record in events]
    assert fold_inputs(read_back) == fold_inputs(events)


def test_scenarios_hold_every_difficulty():
    events = scenarios.generate(4)
    transactions = [record for topic, record in events if topic == "transactions"]
    per_identity = Counter((record["transaction_id"], record.get("revision", 0)) for record in transactions)
    assert max(per_identity.values()) > 1
    revisions = defaultdict(list)
    for record in transactions:
        revisions[record["transaction_id"]].append(record.get("revision", 0))
    assert any(arrived != sorted(arrived) for arrived in revisions.values())
    assert any(record.get("cancelled") for record in transactions)
    moves = defaultdict(set)
    for record in transactions:
        moves[record["transaction_id"]].add((record["portfolio_id"], record["security_id"]))
    assert any(len(keys) > 1 for keys in moves.values())
    closings = [record["business_date"] for topic, record in events if topic == "business-dates"]
    assert closings != sorted(closings)
    books = scenarios.expected_books(events)
    assert len(books.history) == 25
    rows = [row for each in books.snapshots.values() for row in each]
    assert {row.valuation_status for row in rows} == {"VALUED_CURRENT", "VALUED_STALE", "UNVALUED"}
    assert any(row.quantity < 0 for row in rows)
    assert any(row.quantity == 0 for row in rows)
    latest = max(closings)
    assert any(row.position_date.isoformat() > latest for each in books.history.values() for row in each)


def test_any_order_of_arrival_makes_the_same_books():
    events = scenarios.generate(5, events=800)
    shuffled = random.Random(1).sample(events, len(events))
    assert scenarios.expected_books(shuffled, "AVCO") == scenarios.expected_books(events, "AVCO")
