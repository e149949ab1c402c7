"""The books recomputed in plain Python, from semantics.md alone; shares no code with the engine."""

from tidemark.oracle.books import compute_books
from tidemark.oracle.compare import Actual, Difference, StateRow, closing_date, compare
from tidemark.oracle.fold import Inputs, fold_inputs
from tidemark.oracle.model import Books, HistoryRow, Key, Method, Price, SnapshotRow, Transaction

__all__ = [
    "Actual",
    "Books",
    "Difference",
    "HistoryRow",
    "Inputs",
    "Key",
    "Method",
    "Price",
    "SnapshotRow",
    "StateRow",
    "Transaction",
    "closing_date",
    "compare",
    "compute_books",
    "fold_inputs",
]
