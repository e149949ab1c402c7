"""Hours of an installation as Prometheus sees them: healthy ones, in which nothing may fire, and disasters that must.

Values are written as promtool reads them: `0+60x60` begins at 0 and grows by 60, sixty times, a minute apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

NAME = "hours_test.yml"
_ROLES = ("intake", "triggers", "resets", "books")
_GROUPS = {
    "tidemark-intake": "prices",
    "tidemark-triggers": "reprocessing-triggers",
    "tidemark-resets": "reprocessing-jobs",
    "tidemark-books": "reprocessing-status",
}


def lag(group: str) -> str:
    """The series of the group's lag in records."""
    return f'kafka_consumergroup_lag{{consumergroup="{group}",topic="{_GROUPS[group]}",partition="0"}}'


def lag_seconds(group: str) -> str:
    """The series of the group's lag in seconds."""
    return lag(group).replace("_lag{", "_lag_seconds{")


def ready(role: str, worker: str = "0") -> str:
    """The series of a worker's readiness."""
    return f'worker_ready{{instance="{role}-{worker}",role="{role}"}}'


QUIET: dict[str, str] = {
    **{lag(group): "0x60" for group in _GROUPS},
    **{lag_seconds(group): "0x60" for group in _GROUPS},
    **{ready(role): "1x60" for role in _ROLES},
    **dict.fromkeys(
        (
            "audit_differences_total",
            "correction_oldest_open_seconds",
            "corrections_held",
            "corrections_open",
            "dirty_keys",
            "instrument_reprocessing_triggers_pending",
            "internal_records_skipped_total",
            "outbox_events_held",
            "outbox_events_pending",
            "outbox_oldest_age_seconds",
            "partitions_in_trial",
            "reprocessing_keys_reset_total",
            "scheduler_gap_days",
            "table_restore_remaining_records",
            "table_standby_remaining_records",
            "transactions_out_of_range",
            "valuation_keys_total",
            'dead_letters_total{topic="prices",reason="invalid"}',
            'sink_batches_fenced_total{topic="prices"}',
        ),
        "0x60",
    ),
    "audit_last_full_pass_age_seconds": "0+60x60",
    "reprocessing_reset_limit": "10000x60",
}
"""An hour in which nothing happens."""

HEALTHY: dict[str, dict[str, str]] = {
    "nothing happens": {},
    "a price ten months late is reset under the limit for twenty-five minutes": {
        "correction_oldest_open_seconds": "0x5 60+60x25 0x30",
        "corrections_open": "0x5 1x25 0x30",
        "instrument_reprocessing_triggers_pending": "0x5 1x25 0x30",
        lag("tidemark-resets"): "0x5 1x25 0x30",
        lag_seconds("tidemark-resets"): "0x5 60+60x25 0x30",
        "reprocessing_keys_reset_total": "0x5 0+50000x55",
        "scheduler_gap_days": "0x5 300x25 0x30",
        "dirty_keys": "0x5 0+20000x25 0x30",
        "valuation_keys_total": "0x5 0+30000x55",
    },
    "an operator has paused the resets for half an hour": {
        "reprocessing_reset_limit": "10000x10 0x28 10000x22",
        lag("tidemark-resets"): "0x10 3x28 0x22",
        lag_seconds("tidemark-resets"): "0x10 60+60x28 0x22",
        "correction_oldest_open_seconds": "0x10 60+60x28 0x22",
        "corrections_open": "0x10 3x28 0x22",
        "dirty_keys": "0x10 500x28 0x22",
    },
    "a bank's day is closed and valued": {
        "dirty_keys": "0x10 1000000-50000x20 0x30",
        "scheduler_gap_days": "0x10 1x20 0x30",
        "valuation_keys_total": "0x10 0+50000x20 1000000x30",
        "outbox_events_pending": "0x10 5000x20 0x30",
        "outbox_oldest_age_seconds": "0x10 20x20 0x30",
    },
    "it is Monday: the last closed date is Friday's": {"scheduler_gap_days": "3x20 0x40"},
    "new keys of old trades are valued for the first time": {
        "scheduler_gap_days": "0x10 400x20 0x30",
        "dirty_keys": "0x10 500x20 0x30",
        "valuation_keys_total": "0+100x60",
    },
    "every worker is replaced, one after the other": {
        **{ready(role, "1"): "1x60" for role in _ROLES},
        **{ready(role): f"1x{5 + 10 * place} stale 0x2 1x{50 - 10 * place}" for place, role in enumerate(_ROLES)},
        'sink_batches_fenced_total{topic="prices"}': "0x10 1x50",
        "table_restore_remaining_records": "0x16 50000 20000 0x42",
    },
    "what has waited for a broker is caught up with": {
        lag("tidemark-intake"): "90000-2000x45 0x15",
        lag_seconds("tidemark-intake"): "1800-40x45 0x15",
        'dead_letters_total{topic="prices",reason="invalid"}': "7x60",
    },
}
"""Nothing may fire, at any time in it."""

DISASTERS: dict[str, tuple[str, dict[str, str]]] = {
    "the audit finds five thousand differences": ("AuditDifferences", {"audit_differences_total": "0x10 5000x50"}),
    "nobody values": (
        "BooksBehind",
        {"scheduler_gap_days": "0x5 1x55", "valuation_keys_total": "70x60"},
    ),
    "the books are three days behind": ("BooksBehind", {"scheduler_gap_days": "3x60"}),
    "the last worker of a role is gone": ("RoleMissing", {ready("books"): "1x10 stale _x50"}),
    "no worker of a role comes up": ("RoleMissing", {ready("intake"): "1x10 0x50", ready("intake", "1"): "0x60"}),
    "fifty events are held back": ("EventsHeld", {"outbox_events_held": "0x10 50x50"}),
    "nobody resumes": (
        "ResetsPaused",
        {"reprocessing_reset_limit": "0x80", lag("tidemark-resets"): "3x80", "corrections_open": "3x80"},
    ),
    "the resets stand still, and nobody has paused them": (
        "PartitionStuck",
        {
            lag("tidemark-resets"): "0x5 1x55",
            lag_seconds("tidemark-resets"): "0x5 60+60x55",
            "corrections_open": "0x5 1x55",
        },
    ),
    "resets are not fast enough for what arrives, and have stopped": (
        "LagGrowing",
        {lag("tidemark-resets"): "0+5x60", lag_seconds("tidemark-resets"): "400+40x60"},
    ),
    "a partition of prices stands still": (
        "PartitionStuck",
        {lag("tidemark-intake"): "7x60", lag_seconds("tidemark-intake"): "0+60x60"},
    ),
    "a correction hangs": (
        "CorrectionNotRight",
        {"correction_oldest_open_seconds": "0+60x60", "corrections_open": "1x60"},
    ),
}
"""What must fire by the end of it."""


def write(folder: Path) -> None:
    """Write the tests, for the promtool, beside the rules in the folder."""
    hours = [_hour(name, changes, f"count by (alertname) ({_fired('[1h]')})", []) for name, changes in HEALTHY.items()]
    for name, (alert, changes) in DISASTERS.items():
        found = [{"labels": f'{{alertname="{alert}"}}', "value": 1}]
        hours.append(_hour(name, changes, f"group by (alertname) ({_fired('[1h]', alert)})", found))
    YAML(typ="safe").dump({"rule_files": ["alerts.yml"], "evaluation_interval": "1m", "tests": hours}, folder / NAME)


def _fired(within: str, alert: str = ".+") -> str:
    return f'count_over_time(ALERTS{{alertstate="firing",alertname=~"{alert}"}}{within})'


def _hour(name: str, changes: dict[str, str], question: str, answer: list[dict[str, Any]]) -> dict[str, Any]:
    series = {**QUIET, **changes}
    return {
        "name": name,
        "interval": "1m",
        "input_series": [{"series": each, "values": values} for each, values in series.items()],
        "promql_expr_test": [{"expr": question, "eval_time": "1h", "exp_samples": answer}],
    }
