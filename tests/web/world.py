"""What the web tests put into the books."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from decimal import Decimal
from typing import Any

from tests.topology import Event

TOKEN = "a token for tests"
DAYS = [f"2025-01-{day:02}" for day in range(1, 11)]


def trade(portfolio: str, security: str, n: int, quantity: object, day: int, **more: Any) -> Event:
    """A purchase at 10."""
    return "transactions", {
        "transaction_id": f"{portfolio}-{security}-{n}",
        "portfolio_id": portfolio,
        "security_id": security,
        "transaction_date": f"2025-01-{day:02}T10:00:00Z",
        "transaction_type": "BUY",
        "quantity": str(quantity),
        "price": "10",
        "gross_transaction_amount": str(Decimal(str(quantity)) * 10),
        **more,
    }


def price(security: str, day: int, value: object) -> Event:
    """In USD."""
    return "prices", {"security_id": security, "price_date": f"2025-01-{day:02}", "price": value}


def ledger_of(portfolio: str, security: str) -> list[Sequence[Event]]:
    """A price and two trades; then a back-dated trade; then a late price."""
    return [
        [price(security, 1, 10), trade(portfolio, security, 1, 10, 1), trade(portfolio, security, 2, 5, 4)],
        [trade(portfolio, security, 3, 2, 2)],
        [price(security, 3, 11)],
    ]


async def until(look: Callable[[], Awaitable[Any]], what: str, seconds: float = 120) -> Any:
    """The first look that finds something."""
    try:
        async with asyncio.timeout(seconds):
            while not (found := await look()):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            return found
    except TimeoutError:
        raise AssertionError(f"not within {seconds} s: {what}") from None
