"""The job window: a giant blocks nobody, nothing starves, the offset never passes an unfinished job."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinks.chunks import ChunkSize
from sinks.limiter import adapted
from sinks.window import PRIORITY_SECONDS, SIZE_SECONDS, SMALL_JOBS, Lane, Plan, Window, Work

LANE = Lane("jobs", 0, 1)
SMALLEST = 50


def work(job_id: int, keys: int, at: float = 0.0, **more: object) -> Work:
    return Work(job_id, more.pop("security_id", f"S{job_id}"), more.pop("offset", job_id), keys, at, **more)  # type: ignore[arg-type]


def carry_out(window: Window, plan: Plan) -> list[int]:
    """What a perfect worker makes of the plan; returns the jobs that ended."""
    if plan.is_group:
        ended = [job.job_id for job in plan.jobs]
    else:
        (job,) = plan.jobs
        left = job.keys_left - plan.keys
        window.update(plan.lane, replace(job, keys_left=max(0, left), begun=True))
        ended = [job.job_id] if left <= 0 else []
    for job_id in ended:
        window.finish(plan.lane, job_id)
    return ended


def test_small_jobs_behind_a_giant_end_after_one_chunk_of_it_at_most() -> None:
    window = Window(1_000)
    window.take(LANE, [work(1, 1_000_000)], 2)
    assert window.plan(5_000, 1) == Plan(LANE, (work(1, 1_000_000),), 5_000)
    carry_out(window, Plan(LANE, (work(1, 1_000_000),), 5_000))
    window.take(LANE, [work(n, 10, at=5.0) for n in range(2, 200)], 200)  # a later batch
    plan = window.plan(5_000, 6)
    assert plan is not None
    assert [job.job_id for job in plan.jobs] == list(range(2, 200))
    assert plan.keys == 1_980
    assert window.offset_without(LANE, [job.job_id for job in plan.jobs]) == 1  # the giant holds the offset
    carry_out(window, plan)
    assert window.offset(LANE) == 1
    window.finish(LANE, 1)
    assert window.offset(LANE) == 200


def test_another_partition_does_not_wait() -> None:
    window = Window(1_000)
    other = Lane("jobs", 1, 1)
    window.take(LANE, [work(1, 1_000_000)], 2)
    window.take(other, [work(2, 3, at=60.0)], 3)
    plan = window.plan(100, 61)
    assert plan is not None
    assert plan.lane == other


def test_priority_goes_before_size_and_size_before_age() -> None:
    window = Window(1_000)
    window.take(LANE, [work(1, 900_000), work(2, 500_000), work(3, 900_000, at=100.0, priority=1)], 4)
    order = []
    while plan := window.plan(1_000_000, 200):
        order += [job.job_id for job in plan.jobs]
        carry_out(window, plan)
    assert order[0] == 3
    window.take(LANE, [work(4, 10), work(5, 20)], 6)
    window.prioritise({5: 2})
    plan = window.plan(10, 0)
    assert plan is not None
    assert plan.jobs[0].job_id == 5
    window.prioritise({})
    plan = window.plan(10, 0)
    assert plan is not None
    assert plan.jobs[0].job_id == 4


def test_one_security_is_not_twice_in_a_chunk() -> None:
    """An update joined to two jobs of a security would apply one of them only."""
    window = Window(1_000)
    window.take(LANE, [work(1, 5, security_id="S"), work(2, 5, security_id="S"), work(3, 5)], 4)
    plan = window.plan(1_000, 0)
    assert plan is not None
    assert {job.job_id for job in plan.jobs} == {1, 3}
    carry_out(window, plan)
    plan = window.plan(1_000, 0)
    assert plan is not None
    assert [job.job_id for job in plan.jobs] == [2]


def test_a_failed_job_waits_alone() -> None:
    window = Window(1_000)
    window.take(LANE, [work(1, 5), work(2, 5)], 3)
    window.update(LANE, work(1, 5, alone=True, not_before=30.0))
    plan = window.plan(1_000, 10)
    assert plan is not None
    assert [job.job_id for job in plan.jobs] == [2]
    carry_out(window, plan)
    assert window.plan(1_000, 10) is None
    assert window.plan(1_000, 29.9) is None
    plan = window.plan(1_000, 30)
    assert plan is not None
    assert [job.job_id for job in plan.jobs] == [1]
    assert not plan.is_group


def test_a_new_claim_replaces_the_lane_and_a_repeated_job_is_one() -> None:
    window = Window(1_000)
    window.take(LANE, [work(1, 5)], 2)
    window.take(LANE, [work(1, 5, offset=7)], 8)
    assert len(window) == 1
    assert (window.offset(LANE), window.read_to(LANE)) == (7, 8)
    again = Lane("jobs", 0, 2)
    window.take(again, [work(1, 5)], 2)
    assert window.read_to(LANE) is None
    assert (window.read_to(again), len(window)) == (2, 1)


def test_a_new_claim_leaves_other_partitions_and_topics_alone() -> None:
    window = Window(1_000)
    neighbours = [Lane("jobs", 1, 1), Lane("other", 0, 1)]
    for lane in (*neighbours, LANE, Lane("jobs", 0, 2)):
        window.take(lane, [work(1, 5)], 2)
    assert [window.read_to(lane) for lane in (*neighbours, LANE, Lane("jobs", 0, 2))] == [2, 2, None, 2]
    assert len(window) == 3
    window.drop(neighbours[0])
    assert (window.read_to(neighbours[0]), len(window)) == (None, 2)
    window.drop(neighbours[0])  # again is nothing
    window.update(neighbours[0], work(1, 4))
    window.finish(neighbours[0], 1)
    assert len(window) == 2


def test_the_window_is_full_when_it_holds_its_capacity() -> None:
    window = Window(2)
    window.take(LANE, [work(1, 5)], 2)
    assert not window.full
    window.take(Lane("jobs", 1, 1), [work(2, 5)], 3)
    assert window.full


def test_a_job_that_is_read_again_keeps_what_is_known_of_it() -> None:
    window = Window(1_000)
    window.take(LANE, [work(1, 90)], 2)
    window.update(LANE, work(1, 40, begun=True, priority=2))
    window.take(LANE, [work(1, 90, offset=5)], 6)
    assert window.plan(1_000, 0) == Plan(LANE, (work(1, 40, offset=5, begun=True, priority=2),), 1_000)


def test_a_job_that_has_ended_is_not_known_any_more() -> None:
    window = Window(1_000)
    window.take(LANE, [work(1, 90)], 2)
    window.finish(LANE, 1)
    window.update(LANE, work(1, 40))
    assert (len(window), window.plan(1_000, 0), window.offset(LANE)) == (0, None, 2)


def test_a_chunk_is_filled_to_the_last_key_and_no_further() -> None:
    window = Window(1_000)
    window.take(LANE, [work(1, 60), work(2, 50), work(3, 40), work(4, 0), work(5, 1)], 6)
    plan = window.plan(100, 0)
    assert plan is not None
    assert plan.is_group
    assert ({job.job_id for job in plan.jobs}, plan.keys) == ({4, 5, 3, 2}, 91)
    window.prioritise({1: 1, 3: 1})
    plan = window.plan(100, 0)
    assert plan is not None
    assert ([job.job_id for job in plan.jobs], plan.keys) == ([3, 1, 4], 100)
    assert window.plan(39, 0) == Plan(LANE, (work(3, 40, priority=1),), 39)
    assert not window.plan(39, 0).is_group  # type: ignore[union-attr]
    plan = window.plan(40, 0)
    assert plan is not None
    assert ([job.job_id for job in plan.jobs], plan.is_group) == ([3, 4], True)


def test_a_chunk_has_no_more_jobs_than_allowed() -> None:
    window = Window(10_000)
    window.take(LANE, [work(n, 1) for n in range(SMALL_JOBS + 1)], SMALL_JOBS + 1)
    plan = window.plan(5_000, 0)
    assert plan is not None
    assert [job.job_id for job in plan.jobs] == list(range(SMALL_JOBS))


@pytest.mark.parametrize(("misfits", "found"), [(49, [0, 100]), (50, [0])])
def test_a_chunk_looks_past_so_many_that_do_not_fit(misfits: int, found: list[int]) -> None:
    window = Window(1_000)
    first, last = work(0, 0), work(100, 0, at=10.0)
    window.take(LANE, [first, *(work(n, 500, at=5.0) for n in range(1, misfits + 1)), last], 101)
    plan = window.plan(499, 20)
    assert plan is not None
    assert [job.job_id for job in plan.jobs] == found
    for job in plan.jobs:
        window.finish(LANE, job.job_id)
    assert len(window) == misfits + (len(found) == 1)
    assert window.plan(499, 20) is not None  # those that were looked at are still there


def test_what_has_begun_or_failed_goes_alone_in_its_turn() -> None:
    window = Window(1_000)
    window.take(LANE, [work(1, 5, begun=True), work(2, 5), work(3, 5, alone=True)], 4)
    assert window.plan(100, 0) == Plan(LANE, (work(1, 5, begun=True),), 100)
    window.finish(LANE, 1)
    plan = window.plan(100, 0)
    assert plan is not None
    assert [job.job_id for job in plan.jobs] == [2]


def test_the_offset_without_some_jobs_changes_nothing() -> None:
    window = Window(1_000)
    window.take(LANE, [work(n, 5) for n in range(1, 5)], 9)
    window.take(LANE, [work(2, 5, offset=9)], 12)  # its first record is stale now
    assert window.offset_without(LANE, [1]) == 3
    assert window.offset_without(LANE, [3]) == 1
    assert window.offset_without(LANE, [1, 3, 4]) == 9
    assert window.offset_without(LANE, [1, 2, 3, 4]) == 12
    assert window.offset_without(LANE, []) == window.offset(LANE) == 1
    window.finish(LANE, 1)
    assert window.offset(LANE) == 3


_JOBS = st.lists(st.tuples(st.integers(0, 3_000), st.integers(-2, 2), st.integers(0, 20)), min_size=1, max_size=40)


@settings(deadline=None)
@given(_JOBS, st.integers(1, 1_000), st.integers(1, 7), st.data())
def test_every_job_ends_and_the_offset_never_passes_an_open_one(
    jobs: list[tuple[int, int, int]], keys: int, batch: int, data: st.DataObject
) -> None:
    window = Window(10_000)
    waiting = [
        work(n, size, at=float(at), priority=priority, security_id=f"S{n % 7}")
        for n, (size, priority, at) in enumerate(jobs)
    ]
    taken, ended, last, chunks = 0, set[int](), 0, 0
    while len(ended) < len(waiting):
        if taken < len(waiting) and (data.draw(st.booleans()) or not len(window)):
            window.take(LANE, waiting[taken : taken + batch], min(taken + batch, len(waiting)))
            taken = min(taken + batch, len(waiting))
            continue
        plan = window.plan(keys, 1_000.0)
        assert plan is not None
        assert len(plan.jobs) <= SMALL_JOBS
        assert plan.keys <= keys
        assert len({job.security_id for job in plan.jobs}) == len(plan.jobs)
        if plan.is_group:
            promised = window.offset_without(LANE, [job.job_id for job in plan.jobs])
        ended.update(carry_out(window, plan))
        offset = window.offset(LANE)
        if plan.is_group:
            assert offset == promised
        assert offset >= last
        assert offset == min([n for n in range(taken) if n not in ended], default=taken)
        last, chunks = offset, chunks + 1
    assert len(window) == 0
    assert chunks <= sum(size // keys + 2 for size, _, _ in jobs)


@given(st.integers(-3, 3), st.integers(0, 10**7))
def test_nothing_starves(priority: int, keys: int) -> None:
    """Whatever arrives later than a bounded time goes behind, however small and urgent it is."""
    old = work(1, keys, priority=priority)
    latest = SIZE_SECONDS + (3 - priority) * PRIORITY_SECONDS
    assert old.due <= work(2, 0, at=latest, priority=3).due


@given(st.lists(st.tuples(st.integers(0, 10_000), st.floats(0.0001, 5)), max_size=60), st.integers(1, 10_000))
def test_chunk_sizes_stay_within_bounds(chunks: list[tuple[int, float]], largest: int) -> None:
    size = ChunkSize(min(2_000, largest), largest, 0.1, SMALLEST)
    for keys, seconds in chunks:
        after = size.after(keys, seconds)
        assert min(SMALLEST, largest) <= after.count <= largest
        if seconds > 0.1:
            assert after.count <= max(size.count, SMALLEST)
        size = after


@given(st.floats(0.00001, 0.01), st.integers(50, 10_000))
def test_chunks_find_the_target(per_key: float, largest: int) -> None:
    """On a machine of constant speed the chunk ends up as large as the target allows, or as its bounds do."""
    size = ChunkSize(min(2_000, largest), largest, 0.1, SMALLEST)
    for _ in range(60):
        size = size.after(size.count, size.count * per_key)
    seconds = size.count * per_key
    assert seconds <= 0.1 or size.count == SMALLEST
    assert seconds >= 0.025 or size.count == largest


def test_a_chunk_that_took_far_too_long_is_believed() -> None:
    size = ChunkSize(5_000, 5_000, 1.0)
    assert size.after(5_000, 5.0).count == 2_500  # a slow commit, perhaps
    assert size.after(5_000, 900.0).count == 3
    assert ChunkSize(1, 5_000, 1.0).after(1, 1_000.0).count == 1


@given(st.floats(1, 1e6), st.lists(st.booleans(), max_size=200))
def test_the_adaptive_rate_backs_off_at_once_and_recovers_slowly(ceiling: float, congestion: list[bool]) -> None:
    rate = ceiling
    for congested in congestion:
        after = adapted(rate, ceiling, congested=congested)
        assert max(ceiling / 100, 1) * 0.999999 <= after <= ceiling * 1.000001
        if congested:
            assert after == pytest.approx(max(rate / 2, ceiling / 100, 1))
        else:
            assert after <= rate + ceiling / 20 + 1e-6
        rate = after
    for _ in range(20):
        rate = adapted(rate, ceiling, congested=False)
    assert abs(rate - ceiling) < ceiling * 1e-6
