"""Sample data: real daily closes (SOURCE.md), and portfolios that trade at them."""

from tidemark.sample.portfolios import generate_transactions
from tidemark.sample.prices import business_dates, load_prices

__all__ = ["business_dates", "generate_transactions", "load_prices"]
