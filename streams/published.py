"""What consumers of the output topics may have seen of a position or a security, from a place in the logs on."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any

import msgspec

from sinks.reannounce import Published, Seen
from streams import topics
from streams.log_reader import open_log
from streams.settings import Settings

OUTPUTS = (topics.PROCESSED, topics.VALUATIONS, topics.STATUS)

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]


class _Position(msgspec.Struct):
    portfolio_id: _Name
    security_id: _Name
    epoch: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 2**10)]
    from_date: date | None = None


class _Status(msgspec.Struct):
    security_id: _Name
    job_id: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    status: Annotated[str, msgspec.Meta(max_length=40, pattern=r"\A[A-Z_]*\Z")]


_decode_position = msgspec.json.Decoder(_Position).decode
_decode_status = msgspec.json.Decoder(_Status).decode


async def published_since(settings: Settings, positions: Mapping[str, int]) -> Published:
    """What the output topics hold from the positions on, up to their present ends. Raises KafkaError."""
    found = Published()
    async with open_log(settings, [settings.topic(name) for name in OUTPUTS]) as log:
        places = {each: positions.get(f"{each.topic}/{each.partition}", 0) for each in log.ends}
        found.positions = {f"{each.topic}/{each.partition}": end for each, end in log.ends.items()}
        # Beyond its end, a log is another one than the one that was published to.
        found.reaches_back = all(log.starts[each] <= place <= log.ends[each] for each, place in places.items())
        async for record in log.read(places):
            _add(found, record, record.topic == settings.topic(topics.STATUS))
    return found


def _add(found: Published, record: Any, is_status: bool) -> None:
    try:
        if is_status:
            status = _decode_status(record.value)
            found.statuses[status.security_id, status.job_id] = status.status
        else:
            position = _decode_position(record.value)
            key = (position.security_id, position.portfolio_id)
            found.keys.setdefault(key, Seen()).add(position.epoch, position.from_date)
    except (msgspec.MsgspecError, TypeError, ValueError):
        pass  # It is none of ours.
