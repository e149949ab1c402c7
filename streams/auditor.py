"""The background auditor of the `books` role: a process of its own, so that it disturbs no event loop.

It audits within a share of one processor's time (setting AUDIT_SHARE) and tells every difference once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable

from streams import metrics
from streams.settings import Settings

logger = logging.getLogger(__name__)

_PROGRAM = "tidemark.audit.background"  # by name: the oracle knows nothing of the engine, nor the engine of it
_AGAIN_SECONDS = 10.0
_LONGEST_LINE = 1 << 20


async def audit_continuously(settings: Settings, stopping: Callable[[], bool]) -> None:
    """Keep the auditor running until stopping; a crash of it is logged and harms nothing else."""
    if not settings.audit_share:
        return
    while not stopping():
        auditor = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            _PROGRAM,
            stdin=PIPE,
            stdout=PIPE,
            env={**os.environ, **settings.environment()},
            limit=_LONGEST_LINE,
        )
        try:
            await _listen(auditor)
            logger.error("the auditor ended with %s; it is started again", await auditor.wait())
        finally:
            if auditor.returncode is None:
                auditor.kill()
                await auditor.wait()
        await asyncio.sleep(_AGAIN_SECONDS)


async def _listen(auditor: Process) -> None:
    assert auditor.stdout is not None
    async for line in auditor.stdout:
        metrics.AUDIT_DIFFERENCES.inc()
        logger.error("audit: %s", json.loads(line)["line"])
