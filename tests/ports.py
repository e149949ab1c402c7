"""Ports that no other test process on this machine is given.

A free port is found by looking, and is bound a moment later by the server that it was found for. Two test processes
that look at the same time could find the same one. So each process claims a block of its own, below the ports that the
kernel gives to outgoing connections, and goes through it.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.local import ports

_FIRST, _SIZE, _BLOCKS = 15_000, 400, 40


@contextmanager
def block_of_ports() -> Iterator[None]:
    """As long as it is open, `deploy.local.ports` finds free ports in this process's block only."""
    folder = Path(tempfile.gettempdir()) / f"tidemark-test-ports-{os.geteuid()}"
    folder.mkdir(exist_ok=True)
    with _claim(folder) as block, pytest.MonkeyPatch.context() as patch:
        turn = iter(_forever(_FIRST + block * _SIZE))
        patch.setattr(ports, "_any_port", lambda taken: next(p for p in turn if p not in taken and ports.is_free(p)))
        yield


@contextmanager
def _claim(folder: Path) -> Iterator[int]:
    """The first block that no process holds; the kernel gives it back when this one ends, however it ends."""
    for block in range(_BLOCKS):
        with (folder / str(block)).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield block
            return
    raise OSError(f"{_BLOCKS} test processes run on this machine already")


def _forever(first: int) -> Iterator[int]:
    while True:
        yield from range(first, first + _SIZE)
