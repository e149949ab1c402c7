"""The message on `reprocessing-status` that says how far a job is, or what became of a number that has none."""

from __future__ import annotations


def announce(source: str, of_no_job: tuple[str, str] | None = None) -> str:
    """SQL: queue a status for each row of `source` (from …, where …), in order of job_id.

    The rows are of reprocessing_jobs; or, with of_no_job (status, why), they need only job_id and security_id.
    """
    status, total, done, reason = "status", "keys_total", "keys_done", "failure_reason"
    if of_no_job:
        (status, reason), total, done = (f"'{text}'" for text in of_no_job), "null", "0"
    return f"""
insert into outbox_events (topic, message_key, headers, value)
select 'reprocessing-status', convert_to(security_id, 'UTF8'),
       jsonb_build_object('security_id', security_id, 'job_id', job_id::text), convert_to(jsonb_build_object(
    'job_id', job_id, 'security_id', security_id, 'status', {status}, 'keys_total', {total}, 'keys_done', {done},
    'failure_reason', {reason}, 'at', clock_timestamp())::text, 'UTF8')
{source}
order by job_id
"""
