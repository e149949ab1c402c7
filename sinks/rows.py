"""Many rows as one argument of a statement: a JSON array, read by `json_to_recordset`.

The driver encodes an array for each column element by element, numbers by way of their text: five times the processor
time (docs/performance.md). Decimals travel as strings and stay exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

_encoder = msgspec.json.Encoder()


def encode(rows: Sequence[msgspec.Struct]) -> str:
    """An array of objects, whose fields are named as the columns."""
    return _encoder.encode(rows).decode()
