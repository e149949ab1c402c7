"""What `tidemark produce` sends: the keys that keep records in order."""

from __future__ import annotations

import json

from streams import produce


def lines(topic: str, *records: dict[str, object]) -> list[produce.Line]:
    text = b"\n".join(json.dumps(record).encode() for record in records)
    return list(produce.read_lines(topic, text, is_csv=False))


def test_dates_share_a_key_so_that_one_partition_keeps_their_order() -> None:
    sent = lines("business-dates", {"business_date": "2025-01-02"}, {"business_date": "2025-01-03"})
    assert [line.key for line in sent] == [produce.DATES_KEY, produce.DATES_KEY]


def test_prices_are_keyed_by_their_security() -> None:
    price = {"price_date": "2025-01-02", "price": 1}
    sent = lines("prices", {**price, "security_id": "A"}, {**price, "security_id": "B"})
    assert [line.key for line in sent] == [b"A", b"B"]
