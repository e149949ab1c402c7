"""What a failed transaction says about its records, and how a trial's end is put into words."""

from __future__ import annotations

import asyncpg
import pytest

from sinks.failures import Failure, failure_of, is_too_much
from sinks.suspects import Suspect
from streams.hourly import HourlyLimit
from streams.trial import is_unreadable, verdict_is_due
from streams.trials import ending


@pytest.mark.parametrize(
    ("error", "in_effect", "failure"),
    [
        (asyncpg.QueryCanceledError("x"), True, Failure.LIMIT),
        (asyncpg.QueryCanceledError("x"), False, Failure.WAIT),
        (asyncpg.OutOfMemoryError("x"), True, Failure.LIMIT),
        (asyncpg.ConfigurationLimitExceededError("x"), True, Failure.LIMIT),
        (asyncpg.ProgramLimitExceededError("x"), True, Failure.LIMIT),
        (TimeoutError(), True, Failure.LIMIT),
        (TimeoutError(), False, Failure.WAIT),
        (asyncpg.ConnectionDoesNotExistError("x"), True, Failure.LOST),
        (ConnectionResetError(), True, Failure.LOST),
        (asyncpg.InterfaceError("connection is closed"), True, Failure.LOST),
        (ConnectionResetError(), False, Failure.WAIT),
        (asyncpg.AdminShutdownError("x"), True, Failure.WAIT),
        (asyncpg.CrashShutdownError("x"), True, Failure.WAIT),
        (asyncpg.DiskFullError("x"), True, Failure.WAIT),
        (asyncpg.TooManyConnectionsError("x"), False, Failure.WAIT),
        (asyncpg.DeadlockDetectedError("x"), True, Failure.WAIT),
        (asyncpg.LockNotAvailableError("x"), True, Failure.WAIT),
        (asyncpg.ReadOnlySQLTransactionError("x"), True, Failure.WAIT),
        (asyncpg.UndefinedTableError("x"), True, Failure.BUG),
        (KeyError("x"), True, Failure.BUG),
    ],
)
def test_kinds_of_failures(error: Exception, in_effect: bool, failure: Failure) -> None:
    assert failure_of(error, in_effect) is failure


def test_a_limit_is_met_with_fewer_records_at_once_and_what_repeats_with_fewer_later() -> None:
    assert is_too_much(Failure.LIMIT, 1, 100, 5)
    assert not is_too_much(Failure.WAIT, 2, 100, 5)
    assert is_too_much(Failure.WAIT, 3, 100, 5)
    assert is_too_much(Failure.LOST, 3, 2, 5)


def test_one_record_alone_is_given_up_for_its_own_failures_only() -> None:
    assert not is_too_much(Failure.LIMIT, 4, 1, 5)
    assert is_too_much(Failure.LIMIT, 5, 1, 5)
    assert is_too_much(Failure.LOST, 5, 1, 5)
    assert not is_too_much(Failure.WAIT, 1_000, 1, 5)
    assert not is_too_much(Failure.BUG, 1_000, 1, 5), "it is raised as it is"


def test_an_effect_that_cannot_be_divided_is_never_given_up() -> None:
    assert not any(is_too_much(failure, 1_000, 0, 5) for failure in Failure)


def test_verdicts() -> None:
    assert not verdict_is_due(Suspect(7, deaths=2), 3)
    assert verdict_is_due(Suspect(7, deaths=3), 3)
    assert not is_unreadable(Suspect(7, deaths=4), 3)
    assert is_unreadable(Suspect(7, deaths=5), 3)


def test_so_many_an_hour() -> None:
    limit = HourlyLimit(2)
    assert [limit.allow(now) for now in (0.0, 10.0, 20.0, 3599.0, 3600.0, 3605.0, 3610.0)] == [
        True, True, False, False, True, False, True,
    ]  # fmt: skip


def test_endings_in_words() -> None:
    assert ending(-14, 60.0) == "the process took longer than 60 s"
    assert ending(-9, 60.0) == "the process was ended by SIGKILL"
    assert ending(3, 60.0) == "the process ended with status 3"
