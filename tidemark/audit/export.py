"""Differences as a file for other programs, written as they are found."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

from tidemark.oracle import Difference

_COLUMNS = [field.name for field in fields(Difference)]
SUFFIXES = (".csv", ".jsonl")


@contextmanager
def exporting(path: Path) -> Iterator[Callable[[Difference], None]]:
    """A function that adds one difference to the file: CSV with a header, or JSON lines, by its suffix (see SUFFIXES).

    Raises OSError where the file cannot be written.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            yield lambda difference: writer.writerow(asdict(difference))
        else:
            yield lambda difference: _write_line(file.write, difference)


def _write_line(write: Callable[[str], object], difference: Difference) -> None:
    write(json.dumps(asdict(difference), default=str) + "\n")
