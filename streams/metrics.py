"""Prometheus metrics of a worker. No business identifiers in labels (contract, Metrics)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily

DEAD_LETTER_REASONS = ("malformed", "invalid", "conflicting_duplicate", "too_large", "poison")

disable_created_metrics()  # type: ignore[no-untyped-call]

BATCHES = Counter("sink_batches_total", "Batches committed to Postgres", ["topic"])
RECORDS = Counter("sink_records_total", "Records whose effect and offset are committed", ["topic"])
BATCH_SECONDS = Histogram("sink_batch_seconds", "From batch in hand to commit", ["topic"])
FENCED = Counter("sink_batches_fenced_total", "Batches dropped because another worker claimed the partition", ["topic"])
DEAD_LETTERS = Counter("dead_letters_total", "Records refused", ["topic", "reason"])
IN_TRIAL = Gauge("partitions_in_trial", "Partitions read record by record, since workers have died at them", ["topic"])
IGNORED = Counter("sink_records_ignored_total", "Duplicates and lower revisions", ["topic"])
EPOCH_BUMPED = Counter("reprocessing_epoch_bumped", "Keys whose transaction history got a new epoch")
EPOCH_MISMATCH = Counter("epoch_mismatch_dropped", "Events dropped because their epoch was superseded")
KEYS_RESET = Counter("reprocessing_keys_reset", "Keys whose watermark a job has reset")
CHUNK_SECONDS = Histogram("reprocessing_chunk_seconds", "Transactions of resets, from begin to commit")
GENERATION = Gauge("database_generation", "How often published commits of the database have been lost")
GENERATION.set(math.nan)  # not known yet
RESET_RATE = Gauge("reprocessing_reset_rate", "Keys per second that the adaptive mode allows")
RIGHT_SECONDS = Histogram(
    "correction_right_seconds",
    "From a correction's arrival until the books are right again",
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600),
)
KEYS_VALUED = Counter("valuation_keys", "Keys valued")
SNAPSHOTS_WRITTEN = Counter("valuation_snapshots_written", "Snapshots inserted, changed or removed")
OUTBOX_PUBLISHED = Counter("outbox_events_published", "Events acknowledged by the broker")
ROWS_RETIRED = Counter("retention_rows_removed", "Superseded history and finished jobs removed by age")
INTERNAL_SKIPPED = Counter(
    "internal_records_skipped", "Records of internal topics that are none of ours, by why", ["topic", "kind"]
)
TRIGGER_EVENTS = Counter("trigger_events", "Events taken by the trigger agent", ["kind"])

AUDIT_DIFFERENCES = Counter("audit_differences", "Differences that the background auditor found, each counted once")
RESTORE_REMAINING = Gauge(
    "table_restore_remaining_records", "Changelog records still to be read before the table serves"
)
STANDBY_REMAINING = Gauge(
    "table_standby_remaining_records", "Changelog records that the copies of others' partitions have yet to take in"
)
READY = Gauge("worker_ready", "1 when recovered, assigned and the database reachable", ["role"])
POOL_CONNECTIONS = Gauge("database_pool_connections", "Connections of the worker's pool", ["state"])
LAG_ERRORS = Counter("consumergroup_lag_errors", "Looks at the lag that failed: the lag series are absent meanwhile")

OF_TRIALS = {
    "records": RECORDS,
    "letters": DEAD_LETTERS,
    "ignored": IGNORED,
    "epochs": EPOCH_BUMPED,
    "keys": KEYS_RESET,
}
"""What a trial counts in a process of its own, for the worker that has started it."""


def add_counted(before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]) -> None:
    """Add what a trial has counted since. The labels are JSON objects."""
    for name, samples in after.items():
        for labels, value in samples.items():
            named = json.loads(labels)
            counter = OF_TRIALS[name].labels(**named) if named else OF_TRIALS[name]
            counter.inc(value - before.get(name, {}).get(labels, 0))


def expect(topic: str) -> None:
    """Begin the topic's counters at zero: an increase from nothing would not be seen."""
    for reason in DEAD_LETTER_REASONS:
        DEAD_LETTERS.labels(topic, reason)
    for counter in (FENCED, IGNORED, BATCHES, RECORDS, BATCH_SECONDS):
        counter.labels(topic)
    IN_TRIAL.labels(topic)


class Cluster:
    """Gauges of the whole installation, exported by one worker, the observer; others export none, never a stale one.

    gauges: value by metric name, None where this worker does not observe. lags: None where the lag is not known.
    """

    HELP: ClassVar[dict[str, str]] = {
        "instrument_reprocessing_triggers_pending": "Securities with corrections not yet reset",
        "corrections_open": "Corrections not yet right, held ones included",
        "corrections_held": "Corrections whose job failed or was cancelled: stale until requeued",
        "correction_oldest_open_seconds": "Age of the oldest correction that is neither right nor held",
        "reprocessing_active_keys_total": "Keys in status REPROCESSING",
        "reprocessing_reset_limit": "Keys per second that all resets together may take; 0: they are paused",
        "dirty_keys": "Keys with provisional dates up to the latest closed one",
        "dirty_snapshots": "Snapshots to be valued again, at most: provisional closed dates of dirty keys",
        "scheduler_gap_days": "Days from the oldest watermark to the latest closed business date",
        "transactions_out_of_range": "Transactions without effect: they would take a quantity to 10^30 or beyond",
        "outbox_events_pending": "Events that wait to be published",
        "outbox_events_held": "Events held back behind one that cannot be published, and those themselves",
        "outbox_oldest_age_seconds": "Age of the oldest event that waits",
        "audit_last_full_pass_age_seconds": "Since the auditor last went through all keys; NaN: not yet",
    }
    LAG = "kafka_consumergroup_lag"
    LAG_SECONDS = "kafka_consumergroup_lag_seconds"
    LAG_HELP: ClassVar[dict[str, str]] = {
        LAG: "Records from the first unread one to the end of the log",
        LAG_SECONDS: "Age of the first unread record, by its timestamp",
    }

    def __init__(self) -> None:
        self.gauges: dict[str, float] | None = None
        self.lags: list[tuple[str, str, int, int, float]] | None = None

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """For the registry: what is known now."""
        for name, value in (self.gauges or {}).items():
            yield GaugeMetricFamily(name, self.HELP[name], value=value)
        if self.lags is None:
            return
        labels = ["consumergroup", "topic", "partition"]
        records = GaugeMetricFamily(self.LAG, self.LAG_HELP[self.LAG], labels=labels)
        seconds = GaugeMetricFamily(self.LAG_SECONDS, self.LAG_HELP[self.LAG_SECONDS], labels=labels)
        for group, topic, partition, lag, age in self.lags:
            records.add_metric([group, topic, str(partition)], lag)
            seconds.add_metric([group, topic, str(partition)], age)
        yield records
        yield seconds


CLUSTER = Cluster()
REGISTRY.register(CLUSTER)

__all__ = ["REGISTRY"]
