"""The oracle against figures computed by hand, and against laws any books obey."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemark.oracle import Actual, Price, StateRow, Transaction, closing_date, compare, compute_books, fold_inputs
from tidemark.oracle.books import position_history
from tidemark.oracle.costing import stored

KEY = ("P", "S")
D = Decimal
DAY = [date(2025, 9, day) for day in range(1, 13)]  # 1 September 2025 is a Monday
BUSINESS = [day for day in DAY if day.weekday() < 5]


def trade(kind, quantity, price=0, day=1, *, fee=0, identity=None, cancelled=False, hour=10):
    quantity, price = D(str(quantity)), D(str(price))
    return Transaction(
        transaction_id=identity or f"{kind}-{quantity}-{day}-{hour}",
        portfolio_id="P",
        security_id="S",
        transaction_date=datetime(2025, 9, day, hour, tzinfo=UTC),
        transaction_type=kind,
        quantity=quantity,
        price=price,
        gross_transaction_amount=quantity * price,
        trade_fee=D(str(fee)),
        cancelled=cancelled,
    )


def price(value, day, revision=0):
    return Price("S", date(2025, 9, day), D(str(value)), revision=revision)


def after(*trades, method="FIFO"):
    """(quantity, cost, realized) after the last trade."""
    row = compute_books(trades, [], [], method).history[KEY][-1]
    return row.quantity, row.cost_basis, row.realized_gain_loss


def snapshots(trades, prices=(), days=BUSINESS, method="FIFO"):
    return compute_books(trades, prices, days, method).snapshots.get(KEY, [])


# The examples of semantics.md


def test_a_late_sell_between_two_buys():
    trades = [trade("BUY", 100, 200, 1), trade("BUY", 50, 220, 3), trade("SELL", 40, 215, 2)]
    assert after(*trades) == (110, 23_000, 600)
    assert [row.transaction_id.split("-")[0] for row in compute_books(trades, [], [], "FIFO").history[KEY]] == [
        "BUY",
        "SELL",
        "BUY",
    ]


def test_two_late_sells():
    trades = [
        trade("BUY", 100, 10, 1),
        trade("BUY", 50, 12, 4),
        trade("SELL", 20, 11, 2),
        trade("SELL", 30, "11.50", 3),
    ]
    assert after(*trades) == (100, 1_100, D(20) + D(45))


@pytest.mark.parametrize(("method", "realized"), [("AVCO", 200), ("FIFO", 250)])
def test_the_methods_differ(method, realized):
    trades = [trade("BUY", 100, 10, 1), trade("BUY", 100, 12, 2), trade("SELL", 50, 15, 3)]
    assert after(*trades, method=method)[2] == realized


def test_a_plain_valuation():
    (row,) = snapshots([trade("BUY", 10, 100)], [price(110, 1)], [DAY[0]])
    assert (row.market_value, row.unrealized_gain_loss, row.valuation_status) == (
        1_100,
        100,
        "VALUED_CURRENT",
    )


# Positions


def test_fees_are_part_of_cost_and_reduce_proceeds():
    assert after(trade("BUY", 10, 100, fee=5), trade("SELL", 4, 110, 2, fee=2)) == (6, 603, 440 - 2 - 402)


def test_fifo_takes_a_part_of_a_lot_pro_rata():
    trades = [trade("BUY", 3, 10, 1), trade("BUY", 5, 20, 2), trade("SELL", 4, 30, 3)]
    assert after(*trades) == (4, 80, 120 - 30 - 20)


@pytest.mark.parametrize("method", ["FIFO", "AVCO"])
def test_selling_more_than_held_opens_a_short_lot(method):
    # 15 sold for 150 less a fee of 3: 147, of which 10/15 = 98 close the long lot, 49 open the short one.
    assert after(trade("BUY", 10, 8), trade("SELL", 15, 10, 2, fee=3), method=method) == (-5, -49, 18)


@pytest.mark.parametrize("method", ["FIFO", "AVCO"])
def test_buying_back_more_than_short_crosses_to_long(method):
    trades = [trade("SELL", 5, 10, 1), trade("BUY", 8, 9, 2, fee=8)]
    # Paid 72 + 8 = 80, of which 5/8 = 50 close the short (proceeds 50) and 30 buy the three left.
    assert after(*trades, method=method) == (3, 30, 0)


@pytest.mark.parametrize(("method", "cost", "realized"), [("FIFO", -120, 10), ("AVCO", -110, 20)])
def test_short_lots_close_oldest_first_or_at_average(method, cost, realized):
    trades = [trade("SELL", 10, 10, 1), trade("SELL", 10, 12, 2), trade("BUY", 10, 9, 3)]
    assert after(*trades, method=method) == (-10, cost, realized)


def test_long_to_short_to_long():
    trades = [
        trade("BUY", 10, 10, 1),
        trade("SELL", 25, 12, 2),  # closes 10 (realizes 20), short 15 at 12
        trade("BUY", 40, 11, 3),  # closes 15 (realizes 15), long 25 at 11
        trade("SELL", 25, 11, 4),
    ]
    rows = compute_books(trades, [], [], "FIFO").history[KEY]
    assert [(row.quantity, row.cost_basis, row.realized_gain_loss) for row in rows] == [
        (10, 100, 0),
        (-15, -180, 20),
        (25, 275, 35),
        (0, 0, 35),
    ]


def test_transfer_out_takes_cost_and_realizes_nothing():
    assert after(trade("BUY", 10, 10), trade("TRANSFER_OUT", 4, 99, 2)) == (6, 60, 0)


def test_transfer_out_beyond_the_position_opens_a_short_lot_of_cost_zero():
    trades = [trade("BUY", 10, 10), trade("TRANSFER_OUT", 15, 99, 2, fee=7)]
    assert after(*trades) == (-5, 0, 0)
    assert after(*trades, trade("BUY", 5, 3, 3, fee=1)) == (0, 0, -16)


def test_transfer_in_adds_its_amount_without_fee():
    assert after(trade("TRANSFER_IN", 10, 10, fee=5)) == (10, 100, 0)


def test_transfer_in_onto_a_short_realizes_nothing():
    trades = [trade("SELL", 4, 10, 1), trade("SELL", 4, 20, 2)]
    assert after(*trades, trade("TRANSFER_IN", 6, 50, 3)) == (-2, -40, 0)
    assert after(*trades, trade("TRANSFER_IN", 10, 50, 3)) == (2, 100, 0)


def test_a_split_keeps_cost_and_splits_every_lot():
    trades = [trade("BUY", 10, 10, 1), trade("BUY", 10, 20, 2), trade("SPLIT", 3, 0, 3)]
    assert after(*trades) == (60, 300, 0)
    assert after(*trades, trade("SELL", 33, 10, 4)) == (27, 180, 330 - 120)


def test_a_split_of_a_short_and_of_nothing():
    assert after(trade("SPLIT", 2), trade("SELL", 4, 10, 2), trade("SPLIT", "0.5", 0, 3)) == (-2, -40, 0)


@pytest.mark.parametrize("kind", ["DIVIDEND", "INTEREST", "FEE", "TAX"])
def test_income_and_charges_leave_a_row_only(kind):
    rows = compute_books([trade("BUY", 1, 10), trade(kind, 5, 3, 2, fee=1)], [], [], "FIFO").history[KEY]
    assert [(row.sequence, row.quantity, row.cost_basis) for row in rows] == [(1, 1, 10), (2, 1, 10)]


def test_thirds_leave_no_dust():
    trades = [
        trade("BUY", 3, "33.3333333333", 1),
        *(trade("SELL", 1, 40, 2, hour=hour) for hour in (1, 2, 3)),
    ]
    assert after(*trades) == (0, 0, D("20.0000000001"))
    assert after(*trades, method="AVCO") == (0, 0, D("20.0000000001"))


@pytest.mark.parametrize("method", ["FIFO", "AVCO"])
def test_a_tie_reached_through_thirds_is_still_a_tie(method):
    # A cost of 1.0000000001 for 3, of which 1 and then 0.5 leave: exactly half of it stays.
    bought = Transaction("a", "P", "S", datetime(2025, 9, 1, tzinfo=UTC), "BUY", D(3), D("1.0000000001"))
    trades = [bought, trade("SELL", 1, 1, 2), trade("SELL", "0.5", 1, 3)]
    assert after(*trades, method=method)[1] == D("0.5")


def test_stored_values_round_half_even():
    assert stored(D("0.00000000005")) == 0
    assert stored(D("0.00000000015")) == D("0.0000000002")
    assert stored(D("-0.00000000025")) == D("-0.0000000002")
    assert stored(D("0.000000000250001")) == D("0.0000000003")


# Order


def test_ties_are_ordered_by_the_bytes_of_the_id():
    ids = ["b", "B", "ä", "\U0001f600", "\uffee"]
    rows = compute_books([trade("BUY", 1, 1, identity=i) for i in ids], [], [], "FIFO").history[KEY]
    assert [row.transaction_id for row in rows] == ["B", "b", "ä", "\uffee", "\U0001f600"]


def test_position_date_is_the_utc_date():
    inputs = fold_inputs([("transactions", record(transaction_date="2025-09-02T01:30:00+02:00"))])
    assert inputs.books("FIFO").history[KEY][0].position_date == date(2025, 9, 1)


def test_cancelled_transactions_take_no_part():
    trades = [trade("BUY", 10, 10), trade("BUY", 5, 10, 2, cancelled=True), trade("BUY", 1, 10, 3)]
    assert [row.sequence for row in compute_books(trades, [], [], "FIFO").history[KEY]] == [1, 2]
    books = compute_books([trade("BUY", 10, 10, cancelled=True)], [price(1, 1)], BUSINESS, "FIFO")
    assert books.history == {}
    assert books.snapshots == {}


# Valuations


def test_snapshots_run_from_the_first_position_date_to_the_latest_close():
    rows = snapshots([trade("BUY", 10, 100, 3)], [price(110, 2), price(120, 4)])
    assert [row.valuation_date for row in rows] == BUSINESS[2:]
    assert [row.valuation_status for row in rows[:3]] == ["VALUED_STALE", "VALUED_CURRENT", "VALUED_STALE"]
    assert [(row.price_date.day, row.market_value) for row in rows[:3]] == [(2, 1100), (4, 1200), (4, 1200)]


def test_no_price_means_unvalued():
    first, second = snapshots([trade("BUY", 10, 100, 1)], [price(110, 2)], DAY[:2])
    assert (first.price, first.price_date, first.market_value, first.unrealized_gain_loss) == (None,) * 4
    assert first.valuation_status == "UNVALUED"
    assert second.valuation_status == "VALUED_CURRENT"


def test_a_closed_position_leaves_one_row_of_zeros():
    rows = snapshots([trade("BUY", 10, 100, 1), trade("SELL", 10, 90, 2)], [price(110, 1)])
    assert [row.valuation_date for row in rows] == DAY[:2]
    last = rows[-1]
    assert (last.quantity, last.cost_basis, last.market_value, last.unrealized_gain_loss) == (0, 0, 0, 0)
    assert (last.price, last.price_date, last.valuation_status) == (110, DAY[0], "VALUED_STALE")


def test_a_closed_position_without_price_is_zero_and_unvalued():
    last = snapshots([trade("BUY", 10, 100, 1), trade("SELL", 10, 90, 2)])[-1]
    assert (last.market_value, last.unrealized_gain_loss) == (0, 0)
    assert (last.price, last.price_date, last.valuation_status) == (None, None, "UNVALUED")


def test_opened_and_closed_within_a_date_leaves_none():
    trades = [trade("BUY", 10, 100, 2, hour=9), trade("SELL", 10, 90, 2, hour=11)]
    assert snapshots(trades, [price(1, 1)]) == []
    assert snapshots([trade("DIVIDEND", 10, 100, 1)], [price(1, 1)]) == []


def test_opened_and_closed_over_a_weekend_leaves_none():
    assert snapshots([trade("BUY", 10, 100, 6), trade("SELL", 10, 90, 7)], [price(1, 1)]) == []


def test_a_weekend_counts_from_the_next_business_date():
    rows = snapshots([trade("BUY", 10, 100, 6)], [price(100, 5), price(110, 7)])
    assert (rows[0].valuation_date, rows[0].market_value) == (date(2025, 9, 8), 1_100)
    assert (rows[0].price_date, rows[0].valuation_status) == (date(2025, 9, 7), "VALUED_STALE")


def test_closed_over_a_weekend_leaves_the_zeros_on_monday():
    rows = snapshots([trade("BUY", 10, 100, 5), trade("SELL", 10, 90, 6)], [price(100, 5)])
    assert [(row.valuation_date.day, row.quantity) for row in rows] == [(5, 10), (8, 0)]


def test_reopened_after_a_pause():
    trades = [trade("BUY", 1, 10, 1), trade("SELL", 1, 10, 2), trade("SELL", 2, 10, 8)]
    rows = snapshots(trades, [price(10, 1)])
    assert [(row.valuation_date.day, row.quantity) for row in rows] == [
        (1, 1),
        (2, 0),
        (8, -2),
        (9, -2),
        (10, -2),
        (11, -2),
        (12, -2),
    ]
    assert rows[2].market_value == -20


def test_future_dates_take_effect_when_they_close():
    trades = [trade("BUY", 1, 10, 1), trade("BUY", 1, 10, 5)]
    books = compute_books(trades, [price(10, 5)], DAY[:2], "FIFO")
    assert len(books.history[KEY]) == 2
    assert [row.quantity for row in books.snapshots[KEY]] == [1, 1]
    assert {row.valuation_status for row in books.snapshots[KEY]} == {"UNVALUED"}


def test_unrealized_is_of_the_stored_values():
    trades = [trade("BUY", "0.3333333333", "0.3333333333", 1)]
    (row,) = snapshots(trades, [price("0.1234567891", 1)], [DAY[0]])
    assert row.cost_basis == D("0.1111111111")
    assert row.market_value == D("0.0411522630")
    assert row.unrealized_gain_loss == row.market_value - row.cost_basis


# Identity of records


def record(**fields):
    return {
        "transaction_id": "T",
        "portfolio_id": "P",
        "security_id": "S",
        "transaction_date": "2025-09-01",
        "transaction_type": "BUY",
        "quantity": 10,
        "price": "10",
        "gross_transaction_amount": "100",
        **fields,
    }


def test_the_highest_revision_wins_whatever_the_order():
    revisions = [record(revision=n, quantity=n, portfolio_id=f"P{n}") for n in (0, 2, 1, 2)]
    (kept,) = fold_inputs([("transactions", each) for each in revisions]).transactions.values()
    assert (kept.revision, kept.quantity, kept.portfolio_id) == (2, 2, "P2")


def test_a_conflicting_duplicate_is_ignored():
    records = [("transactions", record(quantity=n)) for n in (1, 2)]
    assert fold_inputs(records).transactions["T"].quantity == 1


def test_equal_revisions_of_a_price_are_won_by_the_later():
    one = {"security_id": "S", "price_date": "2025-09-01", "price": "1"}
    records = [
        one,
        {**one, "price": 3, "revision": 1},
        {**one, "price": "2"},
        {**one, "price": "4", "revision": 1},
    ]
    inputs = fold_inputs([("prices", each) for each in records])
    assert [each.price for each in inputs.prices.values()] == [4]


def test_decimals_are_exact_and_rounded_on_intake():
    text = '{"security_id": "S", "price_date": "2025-09-01", "price": 0.12345678905000001}'
    exact = '{"security_id": "T", "price_date": "2025-09-01", "price": "0.12345678905"}'
    inputs = fold_inputs([("prices", text), ("prices", exact), ("business-dates", '{"business_date": "2025-09-01"}')])
    assert [each.price for each in inputs.prices.values()] == [D("0.1234567891"), D("0.1234567890")]
    assert inputs.business_dates == {DAY[0]}


def test_an_unknown_topic_is_refused():
    with pytest.raises(ValueError, match="not an input topic"):
        fold_inputs([("unknown", {})])


# Comparing


def actual_rows(books, epoch=0, watermark=BUSINESS[-1]):
    return Actual(
        history={KEY: list(books.history[KEY])},
        snapshots={KEY: list(books.snapshots[KEY])},
        states={KEY: StateRow(0, watermark, "CURRENT", watermark, closing_date(books.history[KEY]))},
        epochs={KEY: epoch},
    )


def compared(books, actual, **more):
    return [str(difference) for difference in compare(books, actual, latest=BUSINESS[-1], **more)]


@pytest.fixture
def books():
    return compute_books([trade("BUY", 10, 100, 10)], [price(1, 1)], BUSINESS, "FIFO")


def test_equal_books_have_no_differences(books):
    assert compare(books, actual_rows(books), latest=BUSINESS[-1]) == []


def test_every_difference_is_a_line(books):
    actual = actual_rows(books)
    actual.history[KEY][0] = actual.history[KEY][0]._replace(cost_basis=D(999))
    actual.snapshots[KEY][1] = actual.snapshots[KEY][1]._replace(market_value=None)
    actual.snapshots[KEY].pop(0)
    assert compared(books, actual) == [
        "portfolio P, security S, history 1: cost_basis is 999, should be 1000.0000000000",
        "portfolio P, security S, snapshot 2025-09-10: is missing",
        "portfolio P, security S, snapshot 2025-09-11: market_value is null, should be 10.0000000000",
    ]


def test_a_difference_names_its_value_and_the_first_date_it_matters_on(books):
    actual = actual_rows(books)
    actual.snapshots[KEY][1] = actual.snapshots[KEY][1]._replace(quantity=D(9))
    (found,) = compare(books, actual, latest=BUSINESS[-1])
    assert (found.key, found.table, found.day) == (KEY, "daily_position_snapshots", date(2025, 9, 11))
    assert (found.column, found.actual, found.expected) == ("quantity", "9", "10.0000000000")


def test_rows_nobody_expects_are_differences(books):
    empty = compute_books([], [], BUSINESS, "FIFO")
    lines = compared(empty, actual_rows(books))
    assert len(lines) == 4
    assert all(line.endswith("is there, should not be") for line in lines)


def test_two_live_rows_of_one_place_are_a_difference(books):
    actual = actual_rows(books)
    actual.history[KEY].append(actual.history[KEY][0])
    assert compared(books, actual) == ["portfolio P, security S, history 1: more than one live row"]


def test_dirty_keys_answer_for_their_history_and_for_the_dates_before(books):
    actual = actual_rows(books, watermark=BUSINESS[0])
    actual.snapshots[KEY].clear()
    assert compared(books, actual, dirty={KEY: date(2025, 9, 10)}) == []
    assert compared(books, actual, dirty={KEY: date(2025, 9, 11)}) == [
        "portfolio P, security S, snapshot 2025-09-10: is missing"
    ]
    assert any("watermark is 2025-09-01" in line for line in compared(books, actual))
    actual.history.clear()
    assert len(compared(books, actual, dirty={KEY: BUSINESS[0]})) == 1


def test_states_are_checked(books):
    rows = actual_rows(books)
    assert compared(books, replace(rows, states={})) == ["portfolio P, security S, state: is missing"]
    ahead = actual_rows(books, watermark=BUSINESS[-1] + timedelta(days=1))
    assert "beyond the latest closed date" in compared(books, ahead)[0]
    assert "a row has epoch 3" in compared(books, actual_rows(books, epoch=3))[0]
    reprocessing = {KEY: StateRow(0, BUSINESS[-1], "REPROCESSING", BUSINESS[-1])}
    assert compared(books, replace(rows, states=reprocessing)) == [
        "portfolio P, security S, state: status is REPROCESSING, should be CURRENT"
    ]


def test_a_key_that_waits_for_ever_is_a_difference(books):
    waiting = StateRow(0, BUSINESS[0], "REPROCESSING", BUSINESS[0])
    dirty = {KEY: BUSINESS[1]}
    rows = replace(actual_rows(books), states={KEY: waiting})
    assert compared(books, rows, dirty=dirty) == []
    forgotten = replace(rows, states={KEY: waiting._replace(valued_through=BUSINESS[-1])})
    (line,) = compared(books, forgotten, dirty=dirty)
    assert line.endswith("watermark is 2025-09-01, but the security counts as valued through 2025-09-12")


def test_a_closed_position_may_stay_behind():
    books = compute_books([trade("BUY", 10, 100, 1), trade("SELL", 10, 90, 2)], [price(1, 1)], BUSINESS, "FIFO")
    behind = replace(actual_rows(books), states={KEY: StateRow(0, BUSINESS[3], "CURRENT", BUSINESS[-1], DAY[1])})
    assert compared(books, behind) == []
    open_still = replace(behind, states={KEY: StateRow(0, BUSINESS[0], "CURRENT", BUSINESS[-1], DAY[1])})
    assert compared(books, open_still) == [
        "portfolio P, security S, state: watermark is 2025-09-01, should be 2025-09-12"
    ]


@pytest.mark.parametrize(
    ("quantities", "closed_on", "said"),
    [
        ((10, 0), DAY[1], None),
        ((10, 0), DAY[4], None),  # later is safe: it is reached by more
        ((10, 0), DAY[0], "closed_on is 2025-09-01, should be 2025-09-02"),
        ((10, 0), None, "closed_on is null, should be 2025-09-02"),
        ((10, 0, 5), DAY[1], "closed_on is 2025-09-02, should be null"),
        ((10, 0, 5), None, None),
    ],
)
def test_a_key_says_when_it_closed(quantities, closed_on, said):
    steps = [after - before for before, after in zip((0, *quantities), quantities, strict=False)]
    trades = [trade("BUY" if n > 0 else "SELL", abs(n), 1, day) for day, n in enumerate(steps, 1)]
    books = compute_books(trades, [price(1, 1)], BUSINESS, "FIFO")
    marked = StateRow(0, BUSINESS[-1], "CURRENT", BUSINESS[-1], closed_on)
    found = compared(books, replace(actual_rows(books), states={KEY: marked}))
    assert found == ([f"portfolio P, security S, state: {said}"] if said else [])


# Laws

amounts = st.decimals(min_value=D("0.01"), max_value=1_000, places=4)
moves = st.tuples(st.sampled_from(["BUY", "SELL", "TRANSFER_IN", "TRANSFER_OUT"]), amounts, amounts, amounts)
methods = st.sampled_from(["FIFO", "AVCO"])
SIGN = {"BUY": 1, "TRANSFER_IN": 1, "SELL": -1, "TRANSFER_OUT": -1}


def sequence_of(drawn):
    start = datetime(2025, 9, 1, tzinfo=UTC)
    return [
        Transaction(str(n), "P", "S", start + timedelta(hours=n), kind, quantity, quantity * cost, fee)
        for n, (kind, quantity, cost, fee) in enumerate(drawn)
    ]


@given(st.lists(moves, min_size=1, max_size=30), methods)
def test_quantity_is_the_sum_of_what_moved(drawn, method):
    rows = position_history(sequence_of(drawn), method)
    assert rows[-1].quantity == sum(SIGN[kind] * quantity for kind, quantity, _, _ in drawn)
    for row in rows:
        assert row.quantity != 0 or row.cost_basis == 0


@given(st.lists(moves.filter(lambda move: "TRANSFER" not in move[0]), min_size=1, max_size=30), methods)
def test_trades_conserve_money(drawn, method):
    """Realized gain - cost = all that came in - all that went out: so when flat, realized is the cash."""
    last = position_history(sequence_of(drawn), method)[-1]
    cash = sum(q * cost * -SIGN[kind] - fee for kind, q, cost, fee in drawn)
    assert abs(last.realized_gain_loss - last.cost_basis - cash) <= D("2e-10")


@given(st.lists(moves.filter(lambda move: "TRANSFER" not in move[0]), min_size=1, max_size=30), amounts)
def test_the_methods_agree_once_flat(drawn, final):
    held = position_history(sequence_of(drawn), "FIFO")[-1].quantity
    closing = [("SELL" if held > 0 else "BUY", abs(held), final, D(0))] if held else []
    fifo, avco = (position_history(sequence_of([*drawn, *closing]), method)[-1] for method in ("FIFO", "AVCO"))
    assert fifo == avco
    assert (fifo.quantity, fifo.cost_basis) == (0, 0)


@given(st.lists(moves, min_size=1, max_size=15), st.integers(2, 7), st.integers(0, 15), methods)
def test_a_split_changes_quantities_only(drawn, ratio, place, method):
    """Splitting at any time, and trading the new number of shares from then on, changes no money."""
    place = min(place, len(drawn))
    later = [(kind, quantity * ratio, cost / ratio, fee) for kind, quantity, cost, fee in drawn[place:]]
    plain = position_history(sequence_of(drawn), method)
    split = position_history(sequence_of([*drawn[:place], ("SPLIT", D(ratio), D(0), D(0)), *later]), method)
    assert split[-1].quantity == plain[-1].quantity * ratio
    assert abs(split[-1].cost_basis - plain[-1].cost_basis) <= D("1e-9")
    assert abs(split[-1].realized_gain_loss - plain[-1].realized_gain_loss) <= D("1e-9")


@settings(max_examples=30)
@given(st.lists(moves, min_size=1, max_size=20), st.randoms(use_true_random=False), methods)
def test_the_order_of_arrival_does_not_matter(drawn, random, method):
    trades = sequence_of(drawn)
    shuffled = random.sample(trades, len(trades))
    quotes = [price(3, 1), price(4, 2)]
    assert compute_books(shuffled, quotes, BUSINESS, method) == compute_books(trades, quotes, BUSINESS, method)
