"""Laws of the arithmetic (semantics, Order and Positions), for the engine's costing and booking and for the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Context, Decimal, localcontext
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sinks import booking, revisions
from sinks.model import CostBasisMethod, Transaction
from sinks.transactions import Change
from tests.costs import Figures, costs
from tidemark.oracle import Price, compute_books, fold_inputs
from tidemark.oracle import Transaction as OracleTransaction
from tidemark.oracle.books import position_history, position_snapshots

D = Decimal
ZERO = D(0)
START = datetime(2025, 9, 1, tzinfo=UTC)
Costing = Callable[[Sequence[Transaction], CostBasisMethod], list[Figures]]


def by_the_oracle(transactions: Sequence[Transaction], method: CostBasisMethod) -> list[Figures]:
    rows = position_history([of_oracle(t) for t in transactions], method)
    return [(row.quantity, row.cost_basis, row.realized_gain_loss) for row in rows]


def of_oracle(t: Transaction) -> OracleTransaction:
    return OracleTransaction(**{name: getattr(t, name) for name in OracleTransaction.__dataclass_fields__})


def law(*arguments: Any, **named: Any) -> Callable[[Any], Any]:
    """For any drawn input; few of them, since there are many laws."""
    return lambda test: settings(max_examples=min(50, settings().max_examples))(given(*arguments, **named)(test))


COSTINGS = pytest.mark.parametrize("costing", [costs, by_the_oracle], ids=["engine", "oracle"])
methods: st.SearchStrategy[CostBasisMethod] = st.sampled_from(["FIFO", "AVCO"])
amounts = st.decimals(min_value=D("0.01"), max_value=10_000, places=2)
moves = st.tuples(st.sampled_from(["BUY", "SELL", "TRANSFER_IN", "TRANSFER_OUT"]), amounts, amounts, amounts)
trades = moves.filter(lambda move: "TRANSFER" not in move[0])
ratios = st.integers(1, 9)
_LARGEST = D("999999999999999999.9999999999")  # 18 digits before the point, 10 after it: 28 in all
_WIDE = Context(prec=80)
wide = st.decimals(min_value=D("1e-10"), max_value=_LARGEST, places=10)


def transaction(number: int, kind: str, quantity: Decimal, amount: Decimal, fee: Decimal = ZERO) -> Transaction:
    moment = START + timedelta(hours=number)
    return Transaction(f"T{number:03}", "P", "S", moment, kind, quantity, D(0), amount, fee)


def sequence(drawn: Sequence[tuple[str, Decimal, Decimal, Decimal]]) -> list[Transaction]:
    return [transaction(number, *move) for number, move in enumerate(drawn)]


# Order, cancellations, amendments


def booked(arrivals: Sequence[Sequence[Transaction]]) -> tuple[list[Transaction], int]:
    """Batch after batch as the position sink books them: the live history in its order, and the key's epoch."""
    stored: dict[str, Transaction] = {}
    live: list[Transaction] = []
    epoch = 0
    for batch in arrivals:
        changes = []
        for id_ in dict.fromkeys(t.transaction_id for t in batch):
            versions = [(number, t) for number, t in enumerate(batch) if t.transaction_id == id_]
            if winner := revisions.fold(stored.get(id_), versions).winner:
                changes.append(Change(stored.get(id_), winner))
                stored[id_] = winner
        for touch in booking.touches(changes).values():
            tail = booking_tail(live)
            if booking.needs_rebuild(booking.KeyState(epoch, date.min, tail, False), touch):
                live = sorted((t for t in stored.values() if not t.cancelled), key=lambda t: t.order)
                epoch += 1
            else:
                live += touch.arrivals
    return live, epoch


def booking_tail(live: Sequence[Transaction]) -> booking.Base | None:
    return booking.Base(len(live), live[-1].order, booking.CostState()) if live else None


def batches(transactions: Sequence[Transaction], random: Random) -> list[list[Transaction]]:
    rest, made = list(transactions), []
    while rest:
        size = random.randint(1, 4)
        made.append(rest[:size])
        del rest[:size]
    return made


@law(st.lists(moves, min_size=1, max_size=15), st.randoms(use_true_random=False))
def test_the_order_of_arrival_makes_no_difference(drawn: list[tuple[str, D, D, D]], random: Random) -> None:
    inputs = sequence(drawn)
    live, _ = booked(batches(random.sample(inputs, len(inputs)), random))
    assert live == inputs


@law(st.lists(moves, min_size=1, max_size=12), st.integers(0, 11), st.randoms(use_true_random=False), methods)
def test_a_cancelled_transaction_never_was(
    drawn: list[tuple[str, D, D, D]], place: int, random: Random, method: CostBasisMethod
) -> None:
    inputs = sequence(drawn)
    place = min(place, len(inputs) - 1)
    cancellation = msgspec.structs.replace(inputs[place], revision=1, cancelled=True)
    live, _ = booked(batches(random.sample([*inputs, cancellation], len(inputs) + 1), random))
    without = inputs[:place] + inputs[place + 1 :]
    assert live == without
    assert costs(live, method) == costs(without, method)
    oracle = compute_books([of_oracle(t) for t in [*without, cancellation]], [], [], method)
    assert oracle == compute_books([of_oracle(t) for t in without], [], [], method)


@law(st.lists(moves, min_size=1, max_size=12), st.integers(0, 11), moves, st.integers(-400, 400), st.randoms())
def test_an_amended_transaction_is_replaced(
    drawn: list[tuple[str, D, D, D]], place: int, other: tuple[str, D, D, D], hours: int, random: Random
) -> None:
    inputs = sequence(drawn)
    place = min(place, len(inputs) - 1)
    moved = inputs[place].transaction_date + timedelta(hours=hours)
    amended = msgspec.structs.replace(
        transaction(place, *other), transaction_id=inputs[place].transaction_id, transaction_date=moved, revision=1
    )
    live, _ = booked(batches(random.sample([*inputs, amended], len(inputs) + 1), random))
    replaced = sorted([*inputs[:place], amended, *inputs[place + 1 :]], key=lambda t: t.order)
    assert live == replaced


@law(st.lists(moves, min_size=1, max_size=12), st.integers(1, 5))
def test_what_arrives_again_changes_nothing(drawn: list[tuple[str, D, D, D]], times: int) -> None:
    inputs = sequence(drawn)
    assert booked([inputs] * times) == (inputs, 0)


@law(st.lists(moves, min_size=1, max_size=12), moves)
def test_a_batch_makes_one_epoch_at_most(drawn: list[tuple[str, D, D, D]], early: tuple[str, D, D, D]) -> None:
    inputs = sequence(drawn)
    late = [
        msgspec.structs.replace(
            transaction(n, *early), transaction_id=f"L{n}", transaction_date=START - timedelta(n + 1)
        )
        for n in range(3)
    ]
    assert booked([inputs, late])[1] == 1
    assert booked([inputs, *([t] for t in late)])[1] == 3


def test_ties_are_ordered_by_the_bytes_of_the_id() -> None:
    ids = ["B", "b", "ä", "\uffee", "\U0001f600"]
    inputs = [msgspec.structs.replace(transaction(0, "BUY", D(1), D(1)), transaction_id=id_) for id_ in ids]
    live, _ = booked([[t] for t in reversed(inputs)])
    assert [t.transaction_id for t in live] == ids


# Splits


@COSTINGS
@law(drawn=st.lists(moves, min_size=1, max_size=10), ratio=st.sampled_from([2, 4, 5, 8, 10]), method=methods)
def test_split_and_split_back_changes_nothing(
    costing: Costing, drawn: list[tuple[str, D, D, D]], ratio: int, method: CostBasisMethod
) -> None:
    plain = sequence(drawn)
    there, back = (transaction(len(drawn) + n, "SPLIT", r, D(0)) for n, r in enumerate((D(ratio), 1 / D(ratio))))
    split = costing([*plain, there, back], method)
    assert split[-1] == costing(plain, method)[-1]
    assert split[-2][0] == split[-1][0] * ratio
    assert split[-2][1:] == split[-1][1:]


@COSTINGS
@law(drawn=st.lists(moves, min_size=1, max_size=10), first=st.integers(1, 9), second=st.integers(1, 9), method=methods)
def test_two_splits_are_one(
    costing: Costing, drawn: list[tuple[str, D, D, D]], first: int, second: int, method: CostBasisMethod
) -> None:
    plain = sequence(drawn)
    number = len(drawn)
    two = [transaction(number, "SPLIT", D(first), D(0)), transaction(number + 1, "SPLIT", D(second), D(0))]
    one = [transaction(number, "SPLIT", D(first * second), D(0))]
    closing = transaction(number + 2, "SELL", D(7), D(11))
    assert costing([*plain, *two, closing], method)[-1] == costing([*plain, *one, closing], method)[-1]


# FIFO and AVCO


@COSTINGS
@law(drawn=st.lists(trades, min_size=1, max_size=15))
def test_the_methods_differ_in_when_a_gain_is_realized_only(costing: Costing, drawn: list[tuple[str, D, D, D]]) -> None:
    """Realized - cost is the cash so far, whatever the method; and once flat the cost is zero, the gain the same."""
    inputs = sequence(drawn)
    fifo, avco = costing(inputs, "FIFO"), costing(inputs, "AVCO")
    for one, other in zip(fifo, avco, strict=True):
        assert one[0] == other[0]
        assert abs((one[2] - one[1]) - (other[2] - other[1])) <= D("4e-10")
    held = fifo[-1][0]
    assume(held)
    closing = transaction(len(drawn), "SELL" if held > 0 else "BUY", abs(held), D(50))
    flat = [costing([*inputs, closing], method)[-1] for method in ("FIFO", "AVCO")]
    assert [row[:2] for row in flat] == [(0, 0), (0, 0)]
    assert abs(flat[0][2] - flat[1][2]) <= D("1e-10")


@COSTINGS
@law(drawn=st.lists(st.tuples(amounts, amounts), min_size=1, max_size=8), method=methods)
def test_equal_prices_cost_the_same_by_either_method(
    costing: Costing, drawn: list[tuple[D, D]], method: CostBasisMethod
) -> None:
    bought = sum(quantity for quantity, _ in drawn)
    inputs = [transaction(n, "BUY", quantity, quantity * 3) for n, (quantity, _) in enumerate(drawn)]
    sold = transaction(len(drawn), "SELL", bought / 2, bought)
    assert costing([*inputs, sold], method)[-1] == (bought / 2, bought / 2 * 3, bought - bought / 2 * 3)


# Shorts


@COSTINGS
@law(drawn=st.lists(trades, min_size=1, max_size=15), method=methods)
def test_the_mirror_of_a_history_is_short_where_it_was_long(
    costing: Costing, drawn: list[tuple[str, D, D, D]], method: CostBasisMethod
) -> None:
    """Buying for selling and the reverse, without fees: quantities, costs and gains change their sign."""
    free = [(kind, quantity, amount, D(0)) for kind, quantity, amount, _ in drawn]
    mirror = [("SELL" if kind == "BUY" else "BUY", *rest) for kind, *rest in free]
    plain, mirrored = costing(sequence(free), method), costing(sequence(mirror), method)
    assert mirrored == [(-q, -c, -r) for q, c, r in plain]


@COSTINGS
@law(held=amounts, sold=amounts, cost=amounts, method=methods)
def test_through_zero_a_sale_closes_first_and_shorts_the_rest(
    costing: Costing, held: D, sold: D, cost: D, method: CostBasisMethod
) -> None:
    assume(sold > held)
    inputs = [transaction(0, "BUY", held, cost), transaction(1, "SELL", sold, sold * 7)]
    quantity, basis, realized = costing(inputs, method)[-1]
    assert (quantity, basis) == (held - sold, (held - sold) * 7)
    assert realized == held * 7 - cost


# Decimals of 28 digits, dates at both ends


@law(
    st.lists(st.tuples(st.sampled_from(["BUY", "SELL", "TRANSFER_IN", "TRANSFER_OUT"]), wide, wide, wide), max_size=8),
    methods,
)
def test_the_engine_and_the_oracle_agree_at_28_digits(
    drawn: list[tuple[str, D, D, D]], method: CostBasisMethod
) -> None:
    inputs = sequence(drawn)
    assert costs(inputs, method) == by_the_oracle(inputs, method)


@COSTINGS
@law(drawn=st.lists(st.tuples(wide, wide), min_size=1, max_size=8), method=methods)
def test_sums_of_28_digits_are_exact(costing: Costing, drawn: list[tuple[D, D]], method: CostBasisMethod) -> None:
    inputs = [transaction(n, "BUY", quantity, amount) for n, (quantity, amount) in enumerate(drawn)]
    with localcontext(prec=60):
        wanted = (sum(q for q, _ in drawn), sum(a for _, a in drawn), 0)
    assert costing(inputs, method)[-1] == wanted


@law(wide, wide)
def test_market_values_of_56_digits_are_exact(quantity: D, price: D) -> None:
    rows = position_history([of_oracle(transaction(0, "BUY", quantity, D(1)))], "FIFO")
    (snapshot,) = position_snapshots(rows, [Price("S", START.date(), price)], [START.date()])
    exact = int(quantity.scaleb(10, _WIDE)) * int(price.scaleb(10, _WIDE))
    whole, rest = divmod(exact, 10**10)
    whole += rest > 5 * 10**9 or (rest == 5 * 10**9 and whole % 2 == 1)
    assert snapshot.market_value is not None
    assert int(snapshot.market_value.scaleb(10, _WIDE)) == whole


@pytest.mark.parametrize("day", [date(1900, 1, 1), date(9999, 12, 30)])
def test_the_first_and_the_last_date_are_dates_like_any_other(day: date) -> None:
    moment = datetime(day.year, day.month, day.day, 23, 59, 59, 999_999, tzinfo=UTC)
    bought = msgspec.structs.replace(transaction(0, "BUY", D(2), D(20)), transaction_date=moment)
    (touch,) = booking.touches([Change(None, bought)]).values()
    assert touch.arrivals[0].position_date == day
    assert booking.day_before(day) == day - timedelta(days=1)
    books = compute_books([of_oracle(bought)], [Price("S", day, D(11))], [day], "FIFO")
    (row,) = books.snapshots["P", "S"]
    assert (row.valuation_date, row.market_value, row.valuation_status) == (day, 22, "VALUED_CURRENT")


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("1900-01-01T00:00:00Z", date(1900, 1, 1)),
        ("1900-01-01T00:00:00-00:01", date(1900, 1, 1)),
        ("9999-12-31T23:59:59.999999Z", date(9999, 12, 31)),
        ("2024-02-29T23:30:00-01:00", date(2024, 3, 1)),
        ("2025-01-01T00:30:00+01:00", date(2024, 12, 31)),
    ],
)
def test_the_position_date_is_the_utc_date(text: str, day: date) -> None:
    record = {
        "transaction_id": "T", "portfolio_id": "P", "security_id": "S", "transaction_date": text,
        "transaction_type": "BUY", "quantity": 1, "price": 1, "gross_transaction_amount": 1,
    }  # fmt: skip
    (oracle,) = fold_inputs([("transactions", record)]).transactions.values()
    assert oracle.position_date == day
    made = msgspec.structs.replace(transaction(0, "BUY", D(1), D(1)), transaction_date=oracle.transaction_date)
    assert made.position_date == day
