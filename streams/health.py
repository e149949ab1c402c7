"""`/healthz`, `/readyz` and `/metrics`, served by every worker (contract, Web).

`/healthz` does not answer while the event loop is blocked, and says 503 when a loop of the role stands still
(`streams/pulse.py`). Either way only a new process helps. Neither Kafka nor Postgres is asked.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from streams.app import App


def add_pages(app: App) -> None:
    """Mount the three pages on the app's web server."""

    @app.page("/healthz")
    async def healthz(web: Any, request: Any) -> Any:
        standing = app.pulse.standing
        return web.json(
            {"role": app.role, "alive": not standing, "standing_still": standing}, status=503 if standing else 200
        )

    @app.page("/readyz")
    async def readyz(web: Any, request: Any) -> Any:
        missing = await app.ready()
        return web.json(
            {"role": app.role, "ready": missing is None, "missing": missing}, status=503 if missing else 200
        )

    @app.page("/metrics")
    async def metrics(web: Any, request: Any) -> Any:
        return web.bytes(generate_latest(REGISTRY), content_type=CONTENT_TYPE_LATEST.split(";")[0])
