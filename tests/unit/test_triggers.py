"""The trigger table: one in flight, one pending; nothing lost, nothing doubled, whatever comes twice."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from tables.triggers import Entry, Job, Status, Trigger, on_status, on_trigger

NOW = datetime(2025, 1, 1, tzinfo=UTC)


def trigger(seq: int, day: int, reason: str = "price") -> Trigger:
    return Trigger("S", date(2025, 1, day), seq, reason)


def ended(job: Job, status: str = "COMPLETE") -> Status:
    return Status(job.job_id, "S", status)


def test_a_burst_becomes_one_running_and_one_waiting_job() -> None:
    first = on_trigger(None, trigger(1, 20), NOW)
    assert first.publish == Job(1, "S", date(2025, 1, 20), 1, NOW)
    entry = first.entry
    for seq, day in [(2, 15), (3, 25), (4, 18)]:
        decision = on_trigger(entry, trigger(seq, day), NOW)
        assert decision.publish is None
        entry = decision.entry
    assert entry == Entry(first.publish, trigger(4, 15))
    second = on_status(entry, ended(first.publish), NOW)
    assert second.publish == Job(4, "S", date(2025, 1, 15), 4, NOW)
    last = on_status(second.entry, ended(second.publish, "FAILED"), NOW)
    assert (last.entry, last.publish, last.release) == (None, None, True)


def test_a_covered_trigger_changes_nothing_and_a_repair_publishes_again() -> None:
    running = on_trigger(None, trigger(5, 10), NOW)
    assert on_trigger(running.entry, trigger(5, 10), NOW).publish is None
    again = on_trigger(running.entry, trigger(5, 10, "repair"), NOW)
    assert (again.entry, again.publish) == (running.entry, running.publish)
    wider = on_trigger(running.entry, trigger(5, 3, "repair"), NOW)
    assert wider.publish == running.publish
    assert wider.entry == Entry(running.publish, trigger(5, 3, "repair"))


def test_only_the_end_of_the_job_in_flight_releases_it() -> None:
    running = on_trigger(None, trigger(5, 10), NOW)
    for status in (Status(4, "S", "COMPLETE"), Status(5, "S", "PROCESSING"), Status(9, "S", "BOOKS_RIGHT")):
        assert on_status(running.entry, status, NOW).entry == running.entry
    assert on_status(None, Status(5, "S", "COMPLETE"), NOW).entry is None


@given(st.lists(st.tuples(st.integers(1, 28), st.sampled_from(["new", "again", "end", "old end"])), max_size=40))
def test_every_trigger_is_covered_by_a_job(steps: list[tuple[int, str]]) -> None:
    entry: Entry | None = None
    sent: list[Trigger] = []
    jobs: list[Job] = []
    for day, step in steps:
        if step == "new":
            sent.append(trigger(len(sent) + 1, day))
        if step in ("new", "again") and sent:
            decision = on_trigger(entry, sent[-1], NOW)
        elif step == "end" and entry and entry.in_flight:
            decision = on_status(entry, ended(entry.in_flight), NOW)
        elif jobs:
            decision = on_status(entry, Status(jobs[-1].job_id - 1, "S", "COMPLETE"), NOW)
        else:
            continue
        if decision.publish:
            assert entry is None or entry.in_flight is None or step == "end"  # one live job per security
            jobs.append(decision.publish)
        entry = decision.entry
    while entry is not None:
        assert entry.in_flight is not None
        decision = on_status(entry, ended(entry.in_flight), NOW + timedelta(seconds=1))
        jobs += [decision.publish] if decision.publish else []
        entry = decision.entry
    for each in sent:
        assert any(j.seq >= each.seq and j.earliest_impacted_date <= each.earliest_impacted_date for j in jobs)
