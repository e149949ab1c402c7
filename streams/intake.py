"""Role `intake`: the calendar, price and position sinks. Thin: consume, apply, done (design, Topology)."""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence
from datetime import date

from sinks import calendar, positions, prices
from sinks.batches import Batch
from sinks.database import Connection
from sinks.model import Price, Transaction
from streams import generations, health, observer, records
from streams.app import App
from streams.settings import load
from streams.sink_agent import Applied, Sink

app = App("intake", load())
health.add_pages(app)
observer.join(app)
generations.watch(app)


async def close_dates(connection: Connection, dates: Sequence[tuple[int, date]]) -> Applied:
    """Close business dates; closing one again is a no-op."""
    outcome = await calendar.apply(connection, [day for _, day in dates])
    return Applied(corrections=outcome.corrections)


async def store_prices(connection: Connection, numbered: Sequence[tuple[int, Price]]) -> Applied:
    """Store prices; each late one issues a correction."""
    outcome = await prices.apply(connection, [price for _, price in numbered], app.settings.debounce)
    return Applied(ignored=outcome.ignored, corrections=outcome.corrections)


async def book_transactions(connection: Connection, numbered: Sequence[tuple[int, Transaction]]) -> Applied:
    """Book transactions into their keys' histories; late ones rebuild the history under a new epoch."""
    outcome = await positions.apply(connection, numbered, app.settings.cost_basis_method, app.settings.replay_rows)
    return Applied(outcome.ignored, outcome.conflicts, outcome.rebuilt, outcome.corrections)


calendar_sink = Sink(app, "business-dates", records.decode_business_date, close_dates)
price_sink = Sink(app, "prices", records.decode_price, store_prices)
position_sink = Sink(app, "transactions", records.decode_transaction, book_transactions)
app.trials.subjects |= {
    app.settings.topic("business-dates"): calendar_sink,
    app.settings.topic("prices"): price_sink,
    app.settings.topic("transactions"): position_sink,
}


@app.agent(app.input("business-dates"))
async def close_business_dates(batches: AsyncIterable[Batch]) -> None:
    """business-dates → business_dates."""
    await calendar_sink.consume(batches)


@app.agent(app.input("prices"))
async def sink_prices(batches: AsyncIterable[Batch]) -> None:
    """prices → market_prices, corrections."""
    await price_sink.consume(batches)


@app.agent(app.input("transactions"))
async def sink_transactions(batches: AsyncIterable[Batch]) -> None:
    """transactions → transactions, position_history, position_state."""
    await position_sink.consume(batches)
