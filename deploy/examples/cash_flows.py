"""A downstream calculator: net cash per holding, right through every correction, from `transactions-processed` alone.

    python -m deploy.examples.cash_flows kafka://127.0.0.1:9092

Three rules make any consumer of this topic right, whatever is delivered twice, late or by two relays at once:

* Per message key, ignore an event_id that has been passed.
* A marker (sequence 0) begins a new epoch: forget what was known of the key.
* Ignore what belongs to an older epoch than the key's.

What it must not do is undo: the replay after a marker brings every live transaction again, so a total starts from zero.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from decimal import Decimal

from aiokafka import AIOKafkaConsumer

TOPIC = "transactions-processed"

_PAID = {"BUY": -1, "FEE": -1, "TAX": -1, "SELL": 1, "DIVIDEND": 1, "INTEREST": 1}


@dataclass(slots=True)
class Holding:
    """What is known of a key (portfolio, security). complete: the replay of the epoch has arrived in full."""

    epoch: int = 0
    transactions: list[str] = field(default_factory=list)
    replayed: int = 0
    net_cash: Decimal = Decimal(0)

    @property
    def complete(self) -> bool:
        """False while a replay is under way: the total is on its way to the new one."""
        return len(self.transactions) >= self.replayed


class CashFlows:
    """Net cash per (portfolio_id, security_id): sales and income less purchases, fees and taxes."""

    def __init__(self) -> None:
        self.holdings: dict[tuple[str, str], Holding] = defaultdict(Holding)
        self.outdated = 0
        """Messages of older epochs or passed ids, ignored."""
        self._passed: dict[bytes, int] = {}

    def take(self, key: bytes, event_id: int, value: bytes) -> None:
        """One message of the topic, in the order of its partition."""
        if event_id <= self._passed.get(key, 0):
            self.outdated += 1
            return
        self._passed[key] = event_id
        event = json.loads(value, parse_float=Decimal)
        identity = (event["portfolio_id"], event["security_id"])
        holding = self.holdings[identity]
        if event["sequence"] == 0 and event["epoch"] > holding.epoch:
            self.holdings[identity] = Holding(event["epoch"], replayed=event["count"])
        elif event["epoch"] == holding.epoch:
            self._add(holding, event)
        else:
            self.outdated += 1

    @staticmethod
    def _add(holding: Holding, event: dict[str, object]) -> None:
        if event["sequence"] != len(holding.transactions) + 1:
            raise ValueError(f"sequence {event['sequence']} after {len(holding.transactions)}: a message is missing")
        holding.transactions.append(str(event["transaction_id"]))
        sign = _PAID.get(str(event["transaction_type"]), 0)
        amount, fee = Decimal(str(event["gross_transaction_amount"])), Decimal(str(event["trade_fee"]))
        holding.net_cash += sign * amount - (fee if sign else 0)


async def follow(bootstrap_servers: str, flows: CashFlows, topic: str = TOPIC) -> None:
    """Read the topic from its beginning, for ever."""
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=bootstrap_servers, auto_offset_reset="earliest")
    await consumer.start()
    try:
        async for message in consumer:
            event_id = int(dict(message.headers)["event_id"])
            flows.take(message.key, event_id, message.value)
    finally:
        await consumer.stop()


async def _show(flows: CashFlows) -> None:
    shown: dict[tuple[str, str], Decimal] = {}
    while True:
        await asyncio.sleep(1)
        for (portfolio, security), holding in sorted(flows.holdings.items()):
            if holding.complete and shown.get((portfolio, security)) != holding.net_cash:
                shown[portfolio, security] = holding.net_cash
                print(f"{portfolio:<16} {security:<12} epoch {holding.epoch:<4} net cash {holding.net_cash:>18,.2f}")


async def _main(address: str) -> None:
    flows = CashFlows()
    await asyncio.gather(follow(address.removeprefix("kafka://"), flows), _show(flows))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m deploy.examples.cash_flows kafka://host:port")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(sys.argv[1]))
