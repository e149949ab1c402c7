"""What is refused of a server that is too old. `make oldest-postgres` runs every SQL test on the oldest that works."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sinks import database as db
from sinks import session


async def test_a_postgres_that_is_too_old_is_refused_in_one_line(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.Session, "get_server_version", lambda self: SimpleNamespace(major=14))
    for start in (db.migrate, db.check_schema):
        with pytest.raises(db.DatabaseError, match=r"^Postgres 14 is too old: Tidemark needs version 15 or later$"):
            await start(database)
