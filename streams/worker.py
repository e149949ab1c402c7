"""Start one worker of a role in this process; `faust -A streams.ROLE worker` is the same."""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
from typing import NoReturn

import faust

from sinks import database, method
from streams import event_loop, garbage, preflight, tracing
from streams.settings import Settings, SettingsError


async def _check(settings: Settings, role: str) -> None:
    await database.check_schema(settings.dsn)
    await _check_method(settings)
    await preflight.check(settings, role)


async def _check_method(settings: Settings) -> None:
    """Going on by another method would leave books that are right by neither. A database that is away is waited for."""
    wanted = settings.cost_basis_method
    try:
        async with database.open_connection(settings.dsn) as connection:
            found = await method.of_books(connection)
    except Exception as error:
        if database.is_transient(error) or isinstance(error, database.DatabaseError):
            return
        raise
    if found not in (None, wanted):
        raise SettingsError(
            f"the books are kept by {found}, but TIDEMARK_COST_BASIS_METHOD is {wanted}: set it to {found}, since an "
            "installation keeps its method"
        )


def run(role: str, settings: Settings) -> NoReturn:
    """Run until SIGTERM or SIGINT; exits the process. Raises SettingsError, DatabaseError and TopicError."""
    # Role modules read the settings themselves, at import: say what is missing before, in one line.
    settings.broker, settings.dsn  # noqa: B018
    settings.check_web()
    tracing.check()
    asyncio.run(_check(settings, role))
    event_loop.install()
    logging.getLogger("aiokafka").setLevel(logging.WARNING)
    app = importlib.import_module(f"streams.{role}").app
    garbage.look_less_often()
    json = settings.log_format == "json"  # then nothing else may be written among the lines
    worker = faust.Worker(app, loglevel="INFO", redirect_stdouts=False, quiet=json)
    sys.exit(worker.execute_from_commandline())
