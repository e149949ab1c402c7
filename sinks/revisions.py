"""Which revision of a transaction counts: pure (contract, Input topics)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sinks.model import Transaction


@dataclass(slots=True)
class Folded:
    """The version that counts (None: the stored one stays), records ignored, and conflicts by record number."""

    winner: Transaction | None = None
    ignored: int = 0
    conflicts: dict[int, str] = field(default_factory=dict)


def fold(stored: Transaction | None, versions: Sequence[tuple[int, Transaction]]) -> Folded:
    """Take the versions in order of arrival on top of what is stored. All have one transaction_id.

    A higher revision replaces; the same with the same content is a duplicate; the same with other content is a
    conflict; a lower one is ignored.
    """
    folded = Folded()
    current = stored
    for number, version in versions:
        if current is None or version.revision > current.revision:
            folded.winner = current = version
        elif version.revision == current.revision and version != current:
            folded.conflicts[number] = (
                f"transaction {version.transaction_id} revision {version.revision} is already known with other content"
            )
        else:
            folded.ignored += 1
    return folded
