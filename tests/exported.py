"""What a worker exports, as Prometheus reads it."""

from __future__ import annotations

import aiohttp

from deploy.local.stack import Stack


async def exported(stack: Stack, role: str) -> dict[str, float]:
    """The present value of every sample of the role's worker, by name and labels as they are written."""
    async with aiohttp.ClientSession() as web, web.get(f"{stack.worker_url(role)}/metrics") as response:
        lines = [line for line in (await response.text()).splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
