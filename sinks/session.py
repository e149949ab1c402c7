"""A session with Postgres that is given up when nobody at the other end works on what it asked.

A host that goes silent closes nothing: without a deadline a statement waits for its answer for ever. A fixed bound on
statements would be wrong too, since a migration, a large valuation or a wait for a lock may rightly take long. So a
statement that is not answered is asked after, from a session of its own: while its backend is at work it goes on.
Otherwise the session is ended on both sides, its statement fails with an error that passes, and the work is done again.

The watch costs no round trip and no timer per statement. It relies on how asyncpg is made inside: every statement
passes one of the protocol's coroutines (`_ASKS`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import time
from datetime import datetime
from typing import Any, Self

import asyncpg
from asyncpg.protocol import Protocol

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0
"""How long a statement may go unanswered that nobody works on, where the address says nothing else."""

_CONNECT_SECONDS = 10.0
_LOOK_SECONDS = 5.0
_CLOSE_SECONDS = 5.0  # A graceful end, or a cancelled statement, gets so long; then the socket is closed.
_IDLE_SECONDS, _PROBE_SECONDS, _PROBES = 10, 5, 3  # of TCP keepalive

_TCP = (socket.AF_INET, socket.AF_INET6)

_ASKS = (
    "prepare", "bind", "bind_execute", "bind_execute_many", "execute", "query", "copy_in", "copy_out", "close_portal",
    "close_statement",
)  # fmt: skip

_WHO = "select pid, backend_start from pg_stat_activity where pid = pg_backend_pid()"

# A backend that waits for its client, in the middle of a message too, is not at work. Where activity is not tracked the
# state is 'disabled': that counts as work. The second look ends a backend that is not at work, since it holds the locks
# of its transaction and its client never comes back.
_LOOK = """
select is_working, case when $3 and not is_working then pg_terminate_backend(pid) end as ended
from (select pid, state = 'disabled' or (state in ('active', 'fastpath function call')
                                         and wait_event_type is distinct from 'Client') as is_working
      from pg_stat_activity where pid = $1 and backend_start = $2 offset 0) as found
"""
_TCP_INFO_BYTES, _LAST_DATA_RECEIVED = 104, 52  # Linux: struct tcp_info, and in it milliseconds as an unsigned int


_ENDING: set[asyncio.Task[None] | None] = set()
"""Tasks that end what their sessions left on the server; a loop keeps no task alive by itself."""


class Address(str):
    """A database URL, and how long a session there waits for an answer that nobody works on."""

    answer_seconds: float

    def __new__(cls, url: str, answer_seconds: float) -> Self:
        """Like a plain string in every other respect."""
        self = super().__new__(cls, url)
        self.answer_seconds = answer_seconds
        return self

    def __getnewargs__(self) -> tuple[str, float]:  # type: ignore[override]
        """Another process gets the patience with the address."""
        return str(self), self.answer_seconds


class Patience:
    """When this process last had to wait for the database for reasons of the database's own."""

    def __init__(self) -> None:
        self._at = -float("inf")

    def note(self) -> None:
        """The database could not be reached, or is still at work on a statement that takes long."""
        self._at = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since."""
        return time.monotonic() - self._at


PATIENCE = Patience()
"""This process's own: who judges whether its loops stand still asks here first."""


class Session(asyncpg.Connection):  # type: ignore[misc]
    """A connection whose end never waits long for the server."""

    async def close(self, *, timeout: float | None = None) -> None:
        """End in order, or else at once."""
        with contextlib.suppress(TimeoutError):
            await super().close(timeout=_CLOSE_SECONDS if timeout is None else timeout)

    async def _cancel(self, waiter: Any, cancel_waiter: Any = None) -> None:
        """Postgres is asked to cancel what a cancelled task was waiting for, in a connection of its own."""
        patience = self._loop.call_later(_CLOSE_SECONDS, self.terminate)
        try:
            await super()._cancel(waiter, cancel_waiter)
        finally:
            patience.cancel()


async def connect(address: str, **options: Any) -> Session:
    """Open a watched session. options: asyncpg.connect's."""
    seconds = address.answer_seconds if isinstance(address, Address) else ANSWER_SECONDS
    try:
        session: Session = await asyncpg.connect(
            address, **{**options, "connection_class": Session, "timeout": _CONNECT_SECONDS}
        )
        try:
            _set_socket(session, seconds)
            async with asyncio.timeout(_CONNECT_SECONDS):
                await _Watch.begin(session, address, seconds)
        except BaseException:
            session.terminate()
            raise
    except Exception:
        PATIENCE.note()
        raise
    return session


def _set_socket(session: Session, seconds: float) -> None:
    """A host that is gone for good is noticed by the kernel as well, even where no new session can be made."""
    opened = session._transport.get_extra_info("socket")
    if opened is None or opened.family not in _TCP:
        return
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _IDLE_SECONDS),
        ("TCP_KEEPINTVL", _PROBE_SECONDS),
        ("TCP_KEEPCNT", _PROBES),
        ("TCP_USER_TIMEOUT", int(seconds * 1000)),
    ):
        if option := getattr(socket, name, None):  # not every system has them all
            opened.setsockopt(socket.IPPROTO_TCP, option, value)


class _Watch:
    """Looks after a session's statement when it has waited for half of its time, and again each half."""

    def __init__(self, session: Session, address: str, seconds: float, who: tuple[int, datetime]) -> None:
        self._session = session
        self._address = address
        self._half = seconds / 2
        self._who = who
        self._loop = asyncio.get_running_loop()
        self._asked: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._look: asyncio.Task[None] | None = None
        self._is_answered = False

    @classmethod
    async def begin(cls, session: Session, address: str, seconds: float) -> None:
        """Watch the session from now on."""
        row = await session.fetchrow(_WHO)
        session._protocol.__class__ = _Watched
        session._protocol.watch = cls(session, address, seconds, (row["pid"], row["backend_start"]))
        session.add_termination_listener(session._protocol.watch.end)

    def asked(self) -> None:
        """A statement is on its way. One timer serves all that follow one another."""
        self._asked = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._half, self._due)

    def answered(self) -> None:
        """Or it failed."""
        self._asked = None

    def end(self, _: object) -> None:
        """The session is over."""
        if self._timer:
            self._timer.cancel()

    def _due(self) -> None:
        self._timer = None
        if self._asked is None or self._session.is_closed():
            return
        left = self._asked + self._half - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._due)
        else:
            self._look = self._loop.create_task(self._look_after(self._asked))

    async def _look_after(self, asked: float) -> None:
        """Until the statement is answered, or two looks in a row have found nobody at work on it."""
        misses = 0
        while self._asked == asked and not self._session.is_closed():
            looked = self._loop.time()
            if await self._is_worked_on(is_last=misses == 1):
                PATIENCE.note()
                misses = 0
            else:
                misses += 1
            if self._asked != asked:
                break
            if misses == 2:
                waited = self._loop.time() - asked
                logger.warning("Postgres left a statement unanswered for %.0f s; its session is given up", waited)
                self._session.terminate()
                await self._end_backend()
                return
            await asyncio.sleep(max(0.0, looked + self._half - self._loop.time()))
        if self._asked is not None and self._timer is None and not self._session.is_closed():
            self._timer = self._loop.call_later(self._half, self._due)

    async def _end_backend(self) -> None:
        """On the server the session may live on, with its locks, where nobody could be reached to end it yet."""
        _ENDING.add(asyncio.current_task())
        try:
            while not self._is_answered:
                await asyncio.sleep(self._half)
                await self._is_worked_on(is_last=True)
        finally:
            _ENDING.discard(asyncio.current_task())

    async def _is_worked_on(self, *, is_last: bool) -> bool:
        """Whether the backend is at it, or the server at least answers and does not let us ask."""
        self._is_answered = False
        if self._hears():
            return True
        try:
            async with asyncio.timeout(_LOOK_SECONDS):
                other = await asyncpg.connect(self._address, connection_class=Session)
                try:
                    row = await other.fetchrow(_LOOK, *self._who, is_last)
                finally:
                    other.terminate()
        except (OSError, TimeoutError, asyncpg.PostgresConnectionError):
            return False
        except asyncpg.PostgresError:  # too many sessions, a password that was changed: an answer all the same
            return True
        self._is_answered = True
        return row is not None and row["is_working"]

    def _hears(self) -> bool:
        """Whether an answer is coming in: a large one may take long on a slow line."""
        if self._session.is_closed():
            return False
        opened = self._session._transport.get_extra_info("socket")
        if sys.platform != "linux" or opened is None or opened.family not in _TCP:
            return False
        info = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        milliseconds = int.from_bytes(info[_LAST_DATA_RECEIVED : _LAST_DATA_RECEIVED + 4], sys.byteorder)
        return milliseconds < self._half * 900  # and so after the statement was sent


class _Watched(Protocol):  # type: ignore[misc]
    """asyncpg's protocol, telling the watch of each statement."""

    watch: _Watch


def _told(name: str) -> Any:
    ask = getattr(Protocol, name)

    async def asking(self: _Watched, *args: Any, **named: Any) -> Any:
        self.watch.asked()
        try:
            return await ask(self, *args, **named)
        finally:
            self.watch.answered()

    return asking


for _name in _ASKS:
    setattr(_Watched, _name, _told(_name))
