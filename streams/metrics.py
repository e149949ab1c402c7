"""Prometheus metrics of a worker. No business identifiers in labels (contract, Metrics)."""

from __future__ import annotations

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]

BATCHES = Counter("sink_batches_total", "Batches committed to Postgres", ["topic"])
RECORDS = Counter("sink_records_total", "Records whose effect and offset are committed", ["topic"])
BATCH_SECONDS = Histogram("sink_batch_seconds", "From batch in hand to commit", ["topic"])
FENCED = Counter("sink_batches_fenced_total", "Batches dropped because another worker claimed the partition", ["topic"])
DEAD_LETTERS = Counter("dead_letters_total", "Records refused", ["topic", "reason"])
IGNORED = Counter("sink_records_ignored_total", "Duplicates and lower revisions", ["topic"])
EPOCH_BUMPED = Counter("reprocessing_epoch_bumped", "Keys whose transaction history got a new epoch")
EPOCH_MISMATCH = Counter("epoch_mismatch_dropped", "Events dropped because their epoch was superseded")
KEYS_RESET = Counter("reprocessing_keys_reset", "Keys whose watermark a job has reset")
CHUNK_SECONDS = Histogram("reprocessing_chunk_seconds", "Transactions of resets, from begin to commit")
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
TRIGGER_EVENTS = Counter("trigger_events", "Events taken by the trigger agent", ["kind"])

TRIGGERS_PENDING = Gauge("instrument_reprocessing_triggers_pending", "Securities with corrections not yet reset")
ACTIVE_KEYS = Gauge("reprocessing_active_keys_total", "Keys in status REPROCESSING")
SCHEDULER_GAP_DAYS = Gauge("scheduler_gap_days", "Days from the oldest watermark to the latest closed business date")
OUTBOX_PENDING = Gauge("outbox_events_pending", "Events that wait to be published")
OUTBOX_HELD = Gauge("outbox_events_held", "Events held back behind one that cannot be published, and those themselves")
OUTBOX_AGE = Gauge("outbox_oldest_age_seconds", "Age of the oldest event that waits")
AUDIT_DIFFERENCES = Counter("audit_differences", "Differences that the background auditor found, each counted once")
AUDIT_AGE = Gauge("audit_last_full_pass_age_seconds", "Since the auditor last went through all keys; NaN: not yet")
AUDIT_AGE.set(float("nan"))
LAG = Gauge("kafka_consumergroup_lag", "Records behind the log's end", ["consumergroup", "topic", "partition"])
LAG_SECONDS = Gauge(
    "kafka_consumergroup_lag_seconds", "Age of the oldest record not consumed", ["consumergroup", "topic", "partition"]
)

__all__ = ["REGISTRY"]
