"""Run a peer as a process and take what it measured."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PEERS = ROOT / ".venv-bench"
PEERS_PYTHON = PEERS / "bin" / "python"
_LONGEST_SECONDS = 300.0


async def run_peer(name: str, config: dict[str, Any], python: Path | str = sys.executable) -> dict[str, Any]:
    """What the peer prints. Raises RuntimeError with its last line when it prints nothing."""
    process = await asyncio.create_subprocess_exec(
        *(str(python), "-m", f"tests.bench.peers.{name}", json.dumps(config)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_LONGEST_SECONDS):
            out, err = await process.communicate()
    except TimeoutError:
        raise RuntimeError(f"{name}: not done within {_LONGEST_SECONDS:.0f} s") from None
    finally:
        if process.returncode is None:  # or the run is interrupted: a peer would wait for its broker for ever
            process.kill()
            await process.wait()
    lines = [line for line in out.splitlines() if line.startswith(b"{")]  # libraries greet on standard output
    if process.returncode != 0 or not lines:
        said = (out + err).decode(errors="replace").strip().splitlines()[-5:]
        raise RuntimeError(f"{name}: exit code {process.returncode}: {' | '.join(said)}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found
