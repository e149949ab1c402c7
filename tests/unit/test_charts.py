"""Pure parts of the console: coordinates of charts, versions of a history, how figures are shown."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pytest

from streams.web import render
from streams.web.charts import HEIGHT, WIDTH, sparkline, value_chart
from streams.web.pages.key import by_epoch


def test_a_sparkline_shows_the_span_and_no_more() -> None:
    line = sparkline("x", [(0, 100.0), (50, 0.0), (100, 5.0)], 60)
    assert (line.now, line.highest) == (5, 100)
    first, last = line.points.split()
    assert first == f"{WIDTH * (1 - 50 / 60):.1f},{HEIGHT - 1:.1f}"
    assert last.startswith(f"{WIDTH:.1f},")
    assert sparkline("x", [], 60).points == ""
    assert sparkline("x", [(1, 2.0)], 60).points == ""
    assert "nan" not in sparkline("x", [(1, 0.0), (2, 0.0)], 60).points


def test_a_value_chart_marks_what_is_provisional() -> None:
    days = [(date(2025, 1, n), None if n == 2 else float(n), 5.0, n > 3) for n in range(1, 6)]
    chart = value_chart(days)
    assert chart is not None
    assert len(chart.line.split()) == 2  # the 1st and the 3rd: the 2nd has no price
    assert len(chart.provisional_line.split()) == 3  # goes on from the 3rd
    assert chart.provisional_from == pytest.approx(float(chart.line.split()[-1].split(",")[0]), abs=0.1)
    assert value_chart(days[:1]) is None
    assert value_chart([(day, value, cost, False) for day, value, cost, _ in days]).provisional_from is None  # type: ignore[union-attr]


def row(transaction: str, epoch: int, superseded: int | None, sequence: int, quantity: int) -> dict[str, Any]:
    at = datetime(2025, 1, 1 + epoch, tzinfo=UTC)
    return {
        "transaction_id": transaction,
        "epoch": epoch,
        "sequence": sequence,
        "quantity": Decimal(quantity),
        "cost_basis": Decimal(quantity * 10),
        "realized_gain_loss": Decimal(0),
        "recorded_at": at,
        "superseded_epoch": superseded,
        "superseded_at": None if superseded is None else datetime(2025, 1, 1 + superseded, tzinfo=UTC),
    }


def test_versions_of_a_history() -> None:
    rows = [row("a", 0, 2, 1, 10), row("c", 0, 1, 2, 15), row("b", 1, 2, 2, 12), row("c", 1, 2, 3, 17)]
    second, first, zeroth = by_epoch(rows)  # in epoch 2 nothing is left
    assert (second.number, second.live, second.rows) == (2, True, [])
    assert [each["transaction_id"] for each in second.removed] == ["a", "b", "c"]
    assert second.quantity_change == -17
    assert [each["transaction_id"] for each in first.rows] == ["a", "b", "c"]
    assert [each["transaction_id"] for each in first.added] == ["b"]
    assert (first.quantity_change, first.cost_change) == (2, 20)
    assert [each["quantity"] for each in zeroth.rows] == [10, 15]
    assert zeroth.quantity_change is None
    assert zeroth.added == []


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "–"), (0.04, "0.0 s"), (9.96, "10.0 s"), (59.6, "60 s"), (61, "1 min 1 s"), (7260, "2 h 1 min"),
     (90000, "1 d 1 h")],
)  # fmt: skip
def test_spans_of_time(seconds: float | None, shown: str) -> None:
    assert render.seconds(seconds) == shown


def test_figures() -> None:
    assert render.number(1234567) == "1,234,567"
    assert render.number(12.34) == "12.3"
    assert render.decimal(Decimal("1234.5000000000")) == "1,234.5"
    assert render.decimal(Decimal("-0E-10")) == "0"
    assert render.decimal(Decimal("100")) == "100"
    assert render.plural(1, "key") == "1 key"
    assert render.plural(2, "key") == "2 keys"
    assert render.segment("a/b ü") == "a%2Fb%20%C3%BC"


def test_what_a_page_shows_is_escaped() -> None:
    text = render.environment().from_string("{{ x }}").render(x="<script>")
    assert text == "&lt;script&gt;"
