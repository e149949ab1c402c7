"""Migrations on a real Postgres."""

from __future__ import annotations

import asyncio
from decimal import ROUND_HALF_EVEN, Decimal
from random import Random

import pytest

from sinks import database as db


async def test_migrating_again_is_a_no_op(database: str) -> None:
    assert await db.migrate(database) == []


async def test_many_may_migrate_at_once(database: str) -> None:
    connection = await db.connect(database)
    await connection.execute("drop schema tidemark cascade")
    await connection.close()
    applied = await asyncio.gather(*(db.migrate(database) for _ in range(4)))
    assert [name for names in applied for name in names] == [
        f"{version:04d}_{name}" for version, name, _ in db.migrations()
    ]


async def test_a_changed_migration_is_refused_in_one_line(database: str) -> None:
    connection = await db.connect(database)
    await connection.execute("update schema_migrations set sha256 = 'x'")
    await connection.close()
    with pytest.raises(db.DatabaseError, match="changed after it was applied"):
        await db.migrate(database)


async def test_a_newer_database_is_refused_in_one_line(database: str) -> None:
    connection = await db.connect(database)
    await connection.execute("insert into schema_migrations (version, name, sha256) values (9999, 'later', 'x')")
    await connection.close()
    with pytest.raises(db.DatabaseError, match="newer than this program"):
        await db.migrate(database)


async def test_a_database_newer_by_expansion_is_worked_on(database: str) -> None:
    connection = await db.connect(database)
    await connection.execute("insert into schema_migrations values (9999, 'later', 'x', now(), true)")
    await connection.close()
    await db.check_schema(database)
    assert await db.migrate(database) == []


def test_every_migration_says_whether_it_only_expands() -> None:
    for version, name, sql in db.migrations():
        if version > 8:  # before there was a version in use
            assert sql.startswith(("-- expand: ", "-- contract: ")), f"{version:04d}_{name}"


async def test_rounding_in_sql_is_half_even(database: str) -> None:
    random = Random(4)
    places = Decimal("1e-10")
    values = [Decimal(random.randrange(-(10**22), 10**22)).scaleb(-random.randrange(9, 20)) for _ in range(500)]
    values += [Decimal(f"{sign}{n}.{tenth:010d}5") for sign in ("", "-") for n in (0, 7) for tenth in range(6)]
    connection = await db.connect(database)
    rows = await connection.fetch("select round_half_even(v, 10) as r from unnest($1::numeric[]) as v", values)
    await connection.close()
    assert [row["r"] for row in rows] == [value.quantize(places, ROUND_HALF_EVEN) for value in values]
