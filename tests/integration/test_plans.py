"""The plans of hot statements in large books: by index, and no more rows than are asked for.

Each test runs what workers run, twice: planned for its arguments and planned for any, as Postgres may do from the
sixth time on. It names the statements it is about, and fails when one of them is not run any more.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from deploy.local.postgres import PostgresServer
from sinks import (
    audit_reader,
    backlog,
    calendar,
    claiming,
    claims,
    corrections,
    history,
    holders,
    ledger,
    monitor,
    offsets,
    outbox,
    outdated,
    positions,
    prices,
    progress,
    repairs,
    replay,
    resets,
    retention,
    settling,
    transactions,
    valuation,
)
from sinks.batches import Batch
from sinks.corrections import Debounce
from sinks.database import connect
from sinks.model import Job, Price, Transaction
from sinks.valuation import Pass, Valuation
from tests import large
from tests.large import HOLDERS, LAST, LATE, OPEN, SECURITIES, portfolio, security
from tests.plans import Explaining

FEW = [security(number) for number in range(2, 12)]
KEYS = len(FEW) * HOLDERS
MIDNIGHT = datetime(2025, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
async def filled(postgres: PostgresServer) -> AsyncIterator[str]:
    """The address of a database with the books of tests/large.py. Tests leave nothing behind."""
    name = f"plans_{uuid.uuid4().hex[:12]}"
    dsn = await postgres.create_database(name)
    try:
        await large.fill(dsn)
        yield dsn
    finally:
        await postgres.drop_database(name)


@pytest.fixture(params=["force_custom_plan", "force_generic_plan"])
async def books(filled: str, request: pytest.FixtureRequest) -> AsyncIterator[Explaining]:
    connection = await connect(filled)
    undone = connection.transaction()
    await undone.start()
    await connection.execute(f"set local plan_cache_mode = {request.param}; set local statement_timeout = '10s'")
    yield Explaining(connection)
    await undone.rollback()
    await connection.execute("vacuum outbox_events")  # else the next test would find dead rows at the head
    await connection.close()


def rows(keys: int, *, of_each: int = 1, ledger: int = OPEN + 100) -> dict[str, int]:
    """What may be read for so many keys; of_each: rows of history, snapshots or transactions.

    ledger: corrections and jobs. What looks for work may pass over all open ones, but only once.
    """
    inside = dict.fromkeys(("position_history", "daily_position_snapshots", "transactions"), keys * of_each)
    return {
        "position_state": keys, "market_prices": max(keys, 30 * len(FEW)), **inside, "kafka_offsets": keys,
        "outbox_events": keys, "corrections": ledger, "reprocessing_jobs": ledger, "securities": SECURITIES + 2,
    }  # fmt: skip


async def issue(books: Explaining, securities: Sequence[str]) -> list[Job]:
    seqs = await corrections.issue(books, [(each, LATE) for each in securities], "price")
    return [Job(seq, each, LATE, seq, MIDNIGHT) for each, seq in seqs.items()]


async def waiting(books: Explaining, securities: Sequence[str]) -> list[resets.OpenJob]:
    """The securities' jobs, one for each, as they wait in large books."""
    found = await books.connection.fetch(
        "select min(job_id) from reprocessing_jobs where status = 'PENDING' and security_id = any($1) "
        "group by security_id",
        securities,
    )
    return await resets.read(books, [row[0] for row in found])


async def reset(books: Explaining, securities: Sequence[str]) -> None:
    """As resets leave the books, but without what they say to the planner."""
    before = LATE - timedelta(days=1)
    await books.connection.execute(
        "update position_state set watermark_date = $2, status = 'REPROCESSING', reset_seq = 20001 "
        "where security_id = any($1)",
        securities,
        before,
    )
    await books.connection.execute(
        "update corrections set reset_at = now() where right_at is null and security_id = any($1)", securities
    )
    await books.connection.execute(
        "update securities set valued_through = $2 where security_id = any($1)", securities, before
    )


async def test_a_late_price_reads_no_keys(books: Explaining) -> None:
    batch = [Price(each, LATE, Decimal(30), "USD", 1) for each in FEW]
    assert len((await prices.apply(books, batch)).corrections) == len(FEW)
    batch = [Price(each, LATE, Decimal(31), "USD", 1) for each in FEW]
    assert len((await prices.apply(books, batch, Debounce(10, 100))).corrections) == len(FEW)
    books.check(
        rows(0), prices._UPSERT, prices._REMEMBER, corrections._LOCK, corrections._ISSUE, corrections._SETTLE_DOWN
    )


async def test_a_repair_passes_over_the_open_corrections_once(books: Explaining) -> None:
    await books.connection.execute(
        "update corrections set reissue_at = now() where right_at is null and security_id = any($1)", FEW
    )
    assert len(await corrections.reissue(books, 30)) == len(FEW)
    books.check(rows(0), corrections._OVERDUE, corrections._REISSUE)


async def test_jobs_count_the_holders_of_their_securities(books: Explaining) -> None:
    jobs = await issue(books, FEW)
    books.forget()
    opened = await resets.open_jobs(books, jobs)
    assert [job.keys_total for job in opened] == [HOLDERS] * len(FEW)
    ids = [job.job_id for job in opened]
    await resets.note_attempt(books, opened[0], "no", 1)
    await resets.fail(books, opened[0], "no")
    await resets.answer(books, ids)
    await resets.priorities(books)
    books.check(
        rows(KEYS, ledger=400),
        *(resets._INSERT, resets._COUNT, resets._ADOPT, resets._NEEDLESS, resets._ANNOUNCE, resets._READ),
        *(resets._NOTE_ATTEMPT, resets._END, corrections._ENSURE, corrections._LOCK),
    )


async def test_a_chunk_of_a_giant_reads_as_many_keys_as_it_resets(books: Explaining) -> None:
    (job,) = await waiting(books, ["GIANT"])
    books.forget()
    for number in (1, 2):
        chunk = await resets.reset_chunk(books, job, 500)
        assert (chunk.keys_reset, chunk.job.keys_done) == (500, number * 500)
        job = chunk.job
    books.check(rows(500, ledger=100), resets._STEP, resets._RESET_TO, resets._AFTER_STEP)


async def test_the_last_chunk_reads_the_rest_of_the_security(books: Explaining) -> None:
    (job,) = await waiting(books, FEW[:1])
    books.forget()
    assert (await resets.reset_chunk(books, job, 500)).job.ended
    books.check(rows(HOLDERS, ledger=100), resets._STEP, resets._RESET_REST, resets._AFTER_STEP, resets._END)


async def test_small_jobs_read_the_keys_of_their_securities(books: Explaining) -> None:
    jobs = await waiting(books, FEW)
    books.forget()
    assert (await resets.reset_small(books, jobs)).keys_reset == KEYS
    books.check(rows(KEYS, ledger=400), resets._TAKE_SMALL, resets._RESET_SMALL, resets._END, corrections._LOCK)


async def test_a_valuation_reads_the_keys_that_are_due(books: Explaining) -> None:
    await reset(books, FEW)
    valued = Valuation(books, 2 * KEYS)  # type: ignore[arg-type]
    done = await valued.pass_once()
    assert (done.keys, done.securities, len(done.right)) == (KEYS, len(FEW), 2 * len(FEW))
    assert await valued.pass_once() == Pass()
    books.check(
        rows(KEYS, of_each=3),
        *(claims._DUE, claims._CLAIM, valuation._REVALUE, valuation._ADVANCE),
        *(settling._DONE, settling._HOLD, settling._RAISE),
        *(corrections._SETTLE, corrections._UNSETTLED),
    )


async def test_the_valuation_of_a_giant_reads_on_from_where_it_was(books: Explaining) -> None:
    await reset(books, ["GIANT"])
    valued = Valuation(books, 500)  # type: ignore[arg-type]
    valued._swept = math.inf  # the sweep, once a second, passes over what is valued: not how it reads on
    for _ in (1, 2):
        assert (await valued.pass_once()).keys == 500
    books.check(rows(501, of_each=3), claims._CLAIM, valuation._REVALUE, valuation._ADVANCE)


async def test_what_is_done_is_told_by_its_own_keys_while_a_giant_is_due(books: Explaining) -> None:
    many = [security(number) for number in range(1, 501)]
    await reset(books, ["GIANT"])
    await books.connection.execute(
        "update securities set valued_through = $2 where security_id = any($1)", many, LATE - timedelta(days=1)
    )
    assert await settling.settle(books, many, LAST) == (len(many), [])
    books.check(rows(len(many) * HOLDERS), settling._DONE, settling._HOLD, settling._RAISE)


async def test_a_closed_date_is_valued_key_by_key(books: Explaining) -> None:
    await books.connection.execute("insert into business_dates values ($1)", LAST + timedelta(days=1))
    valued = Valuation(books, 500)  # type: ignore[arg-type]
    for _ in (1, 2):
        assert (await valued.pass_once()).keys == 500
    books.check(rows(500), claims._DUE, claims._CLAIM, valuation._REVALUE)


async def test_what_a_herd_has_made_due_is_found_in_one_pass(books: Explaining) -> None:
    """Statistics know of no open correction and of no security that is due: there are thousands of both."""
    await books.connection.execute("update corrections set reset_at = now() where right_at is null")
    await books.connection.execute("update securities set valued_through = $1", LATE)
    assert await due(books) == (1_000, 0)
    await books.connection.execute("update corrections set right_at = now() where right_at is null")
    assert await due(books) == (0, 1_000)
    books.check(rows(0), claims._DUE)


async def due(books: Explaining) -> tuple[int, int]:
    """How many securities are found in each of the valuation's queues, of a thousand at most."""
    row = await books.fetchrow(claims._DUE, LAST, 1_000, 64, 1)
    assert row is not None
    return len(row["corrected"]), len(row["behind"])


async def test_a_herd_is_valued_although_statistics_know_of_one_security_only(books: Explaining) -> None:
    """Made when one alone had corrections, they take the whole ledger for any security's."""
    for column, nulls, values in (("security_id", 0, 1), ("right_at", 0.3, -1), ("reset_at", 0.3, -1)):
        await books.connection.execute("select pg_clear_attribute_stats('tidemark', 'corrections', $1, false)", column)
        await books.connection.execute(
            "select pg_restore_attribute_stats('schemaname', 'tidemark', 'relname', 'corrections', 'inherited', false, "
            "'attname', $1::text, 'null_frac', $2::real, 'avg_width', 8, 'n_distinct', $3::real)",
            *(column, nulls, values),
        )
    await reset(books, FEW)
    done = await Valuation(books, 2 * KEYS).pass_once()  # type: ignore[arg-type]
    assert (done.keys, done.securities, len(done.right)) == (KEYS, len(FEW), 2 * len(FEW))
    jobs = await issue(books, FEW)
    async with books.transaction():
        opened = await resets.open_jobs(books, jobs)
    async with books.transaction():
        assert (await resets.reset_small(books, opened)).keys_reset == KEYS
    async with books.transaction():
        await corrections.issue(books, [(each, LATE) for each in FEW], "price", Debounce(10, 100))
    books.check(
        rows(KEYS, of_each=3),
        *(claims._DUE, corrections._UNSETTLED, corrections._SETTLE),
        *(resets._ADOPT, resets._NEEDLESS, resets._RESET_SMALL, resets._END, corrections._SETTLE_DOWN),
    )


async def test_counting_the_backlog_reads_what_is_provisional(books: Explaining) -> None:
    """Half of the securities are reset; the corrections of the others wait."""
    await books.connection.execute(
        "update corrections set reset_at = now(), right_at = now() where right_at is null and security_id <> all($1)",
        FEW,
    )
    await reset(books, FEW[:5])
    async with books.transaction():
        assert (await monitor.count_keys(books))["dirty_keys"] == KEYS
    books.check(rows(KEYS), monitor._KEYS)


async def test_counting_the_ledger_reads_what_is_open(books: Explaining) -> None:
    await books.connection.execute("update backlog set again_at = '-infinity'")
    _, found = await backlog._part(books, "ledger", monitor.read_ledger, 5)
    assert found["corrections_open"] == OPEN
    books.check(rows(0), monitor._LEDGER, backlog._KEEP)


async def test_what_is_provisional_is_told_by_index(books: Explaining) -> None:
    """Of a key, and of a security on a date, while corrections wait for every security."""
    found = await ledger.daily_values(books, portfolio(1), FEW[0])
    assert [row["provisional"] for row in found] == [True] * 3
    holders_ = await books.fetch(
        "select provisional from current_valuations where security_id = $1 and valuation_date = $2", FEW[0], LAST
    )
    assert [row["provisional"] for row in holders_] == [True] * HOLDERS
    assert len(await ledger.largest_holders(books, FEW[0])) == 10
    books.check(
        rows(HOLDERS, of_each=3, ledger=10) | {"reach": HOLDERS, "business_dates": 400}, ledger._VALUES, ledger._LARGEST
    )


async def test_reach_is_kept_by_index(books: Explaining) -> None:
    """Triggers keep it, whose statements show in Postgres' counters only: each looks at the corrections it is about."""
    counters = (
        "select sum(seq_scan)::int as scans, sum(idx_tup_fetch)::int as rows from pg_stat_xact_user_tables "
        "where relname in ('corrections', 'reach')"
    )
    connection = books.connection
    before = await connection.fetchrow(counters)
    jobs = await issue(books, FEW)
    opened = await resets.open_jobs(connection, jobs)
    of_jobs = "select whole_from, part_from from reach where security_id = any($1)"
    assert set(map(tuple, await connection.fetch(of_jobs, FEW))) == {(None, LATE)}
    await resets.reset_small(connection, opened)
    assert await connection.fetch(of_jobs, FEW) == []
    after = await connection.fetchrow(counters)
    assert after["scans"] == before["scans"]
    assert after["rows"] - before["rows"] <= len(FEW) * 3 * 20, "three corrections each, some looks at each"


async def test_progress_reads_what_its_corrections_wait_for(books: Explaining) -> None:
    await reset(books, FEW)
    found = await progress.security_progress(books, FEW[0])
    assert [each.keys_to_value for each in found if each.phase == "VALUING"] == [HOLDERS, HOLDERS]
    await books.fetch(monitor._KEY, portfolio(1), FEW[0])
    await books.fetch(monitor._HISTORY, portfolio(1), FEW[0], None, 100)
    books.check(
        rows(2 * HOLDERS, ledger=100), progress._PROGRESS, progress._OF_SECURITY, monitor._KEY, monitor._HISTORY
    )


def trade(number: int, day: int, **changes: object) -> Transaction:
    """A purchase of one of 200 keys, the same for every two hundredth number."""
    given = {
        "transaction_id": f"N{number}", "portfolio_id": portfolio(1 + number // 100 % 2),
        "security_id": security(1 + number % 100), "transaction_date": MIDNIGHT + timedelta(days=day - 1, hours=10),
        "transaction_type": "BUY", "quantity": Decimal(5), "price": Decimal(10),
        "gross_transaction_amount": Decimal(50),
    }  # fmt: skip
    return Transaction(**{**given, **changes})  # type: ignore[arg-type]


async def book(books: Explaining, batch: Sequence[Transaction], replay_rows: int = 150) -> positions.PositionOutcome:
    return await positions.apply(books, list(enumerate(batch)), "FIFO", replay_rows)


async def test_appends_read_the_last_row_of_each_key(books: Explaining) -> None:
    assert (await book(books, [trade(number, 31) for number in range(200)])).appended == 200
    created = [trade(number, 31, transaction_id=f"C{number}", portfolio_id="NEW") for number in range(100)]
    assert (await book(books, created)).appended == 100
    books.check(
        rows(200),
        *(transactions._INSERT, positions._CREATE_KEYS, positions._LOCK_KEYS, positions._READ_KEYS, history._WRITE),
        *(replay._APPENDED, holders._MARK, positions._LOWER),
    )


async def test_disposals_read_the_lots_they_take(books: Explaining) -> None:
    """The lots are found inside a function, whose statements show in Postgres' counters only."""
    counters = "select seq_scan, idx_tup_fetch from pg_stat_xact_user_tables where relname = 'position_history'"
    await book(books, [trade(number, 30) for number in range(200)])
    sold = [trade(200 + number, 31, transaction_type="SELL", quantity=Decimal(12)) for number in range(199)]
    sold.append(trade(0, 31, transaction_id="LONG", security_id="LONG", transaction_type="SELL", quantity=Decimal(5)))
    before = await books.connection.fetchrow(counters)
    assert (await book(books, sold)).appended == 200
    after = await books.connection.fetchrow(counters)
    read = after["idx_tup_fetch"] - before["idx_tup_fetch"]
    assert after["seq_scan"] == before["seq_scan"]
    assert read <= 200 * 8, "the last row and the lot, explained and run, both by two looks"
    books.check(rows(200), history._LOTS)


async def test_a_rebuild_reads_from_the_place_that_changes(books: Explaining) -> None:
    dated_back = [trade(number, 5) for number in range(200)]
    assert (await book(books, dated_back)).rebuilt == 200
    ids = [each.security_id + each.portfolio_id for each in dated_back]
    amended = [trade(number, 10, transaction_id=id_, revision=1) for number, id_ in enumerate(ids)]
    assert (await book(books, amended)).replayed == 400
    books.check(
        rows(200, of_each=2, ledger=0),
        *(transactions._LOCK, transactions._REPLACE, transactions._FROM_PLACE, history._BASES, history._SUPERSEDE),
        *(replay._MARKED, replay._REPLAYED, replay._DEFERRED, positions._MOVE_KEYS, corrections._RECORD),
    )


async def test_a_long_history_is_read_from_where_it_changes(books: Explaining) -> None:
    """Of its 20,000 rows those of twelve days are valued, and those of one day booked anew."""
    await reset(books, ["LONG"])
    assert (await Valuation(books, 500).pass_once()).keys == 1  # type: ignore[arg-type]
    late = trade(0, LAST.day, transaction_id="LATE", security_id="LONG")
    assert (await book(books, [late])).replayed == large.IN_LONG + 1
    books.check(
        rows(1, of_each=150),
        *(valuation._REVALUE, positions._READ_KEYS, history._BASES, transactions._FROM_PLACE, history._SUPERSEDE),
        replay._DEFERRED,
    )


async def test_what_an_earlier_version_has_left_is_found_by_its_own_indexes(books: Explaining) -> None:
    await books.connection.execute(
        "update position_history set split_ratio = 2 "
        "where sequence = 1 and portfolio_id = $1 and security_id = any($2)",
        portfolio(1),
        FEW,
    )
    rebuilder = outdated.Rebuilder(books, "FIFO")  # type: ignore[arg-type]
    assert (await rebuilder.step()).keys == len(FEW)
    assert (await rebuilder.step()).keys == 0
    books.check(rows(4 * len(FEW)), outdated._NEXT)


async def test_a_repair_reads_the_history_of_its_keys(books: Explaining) -> None:
    keys = [(security(number), portfolio(1)) for number in range(1, 51)]
    assert await repairs.rebuild(books, "test", keys, "FIFO") == 50
    books.check(rows(50), repairs._ENSURE_KEYS, repairs._RAISE_EPOCHS)


async def test_an_offset_is_claimed_and_moved_by_its_key(books: Explaining) -> None:
    async def pool() -> Explaining:
        return books

    async def nothing(connection: object) -> None:
        pass

    worker = offsets.Offsets(pool, "group1", lambda: False)  # type: ignore[arg-type]
    claims = await worker.claim({("topic1", number): 0 for number in range(10)})
    batch = Batch("topic1", 3, claims["topic1", 3].epoch, 1000, [])
    await worker.step(batch, 1001, nothing)
    await books.fetch(offsets._READ_BACK, "group1", "topic1", 3)
    books.check(rows(1), claiming.CLAIM, offsets._SWAP, offsets._READ_BACK)


async def test_the_outbox_is_read_from_its_head(books: Explaining) -> None:
    await books.connection.execute(
        "update outbox_events set held_at = now(), failure_reason = 'no' where id % 100 = 0 and id <= 20000"
    )
    await books.connection.execute(
        "insert into outbox_events (topic, message_key, value) select topic, message_key, value from outbox_events "
        "where held_at is not null"
    )
    window = await outbox.read(books, 500, 2**20)
    await outbox.acknowledge(books, window.events)
    await outbox.hold(books, (await outbox.read(books, 10, 2**20)).events[0], "no")
    keys = await outbox.held_keys(books)
    assert (len(window.events), len(keys)) == (500, 100)
    assert len(await outbox.held_keys(books, keys[-1][2], 500)) == 101
    await outbox.read_held(books, keys[0], 500, 2**20)
    books.check(rows(710), outbox._READ, outbox._HELD_KEYS, outbox._READ_HELD)


async def test_a_replay_is_read_piece_by_piece(books: Explaining) -> None:
    """Behind live messages, among a thousand others whose epochs are over."""
    await books.connection.execute(
        "insert into outbox_events (topic, message_key, replay) "
        "select 'transactions-processed', position_key(portfolio_id, security_id), jsonb_build_object("
        "'security_id', security_id, 'portfolio_id', portfolio_id, 'epoch', (portfolio_id <> $1)::int, "
        "'next', 1, 'last', 1, 'event_ids', '[[1, 1]]'::jsonb) "
        "from position_state where security_id between 'S00001' and 'S00010' order by security_id, portfolio_id",
        portfolio(1),
    )
    await books.connection.execute("delete from outbox_events where replay is null and id % 100 > 0")
    window = await outbox.read(books, 1_000, 2**20)
    assert (len(window.events), window.outdated) == (302, 198)
    books.check(rows(1_300, of_each=200), outbox._READ, replay._PIECES, outbox._ABANDON)


async def test_retention_reads_what_it_removes(books: Explaining) -> None:
    assert await retention.purge_history(books, timedelta(days=1), 100) == 100
    books.check(rows(100), retention._PURGE_HISTORY)


async def test_a_late_closing_looks_for_one_key_of_each_security(books: Explaining) -> None:
    assert len(await books.fetch(calendar._SECURITIES_WITH_KEYS)) == SECURITIES + 2
    books.check(rows(SECURITIES + 2), calendar._SECURITIES_WITH_KEYS)


async def test_an_audit_reads_its_piece(books: Explaining) -> None:
    reader = audit_reader.BooksReader(books)  # type: ignore[arg-type]
    piece = await reader.head(audit_reader.Piece(after=(security(100), portfolio(10))), 200)
    assert len((await reader.read(piece)).states) == 200
    listed = audit_reader.Piece(keys=tuple((security(number), portfolio(7)) for number in range(1, 201)))
    assert len((await reader.read(listed)).states) == 200
    books.check(
        rows(200, of_each=3) | {"market_prices": 200 * 30},
        *(audit_reader._BOUNDARY, audit_reader._DIRTY_LISTED, audit_reader._PRICES),
    )
