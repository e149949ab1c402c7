"""A real Chromium on the running console."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from playwright.async_api import Page, async_playwright

from tests.web.world import TOKEN

CHROMIUM = shutil.which("chromium")
SHOTS = Path(os.environ.get("TIDEMARK_SCREENSHOTS", Path(__file__).parent / "screenshots"))
SHOTS.mkdir(parents=True, exist_ok=True)
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="CHROMIUM IS NOT INSTALLED: run tests/web/install-packages.sh as root"
)


@asynccontextmanager
async def open_console(url: str, *, scheme: str = "light", log_in: bool = True) -> AsyncIterator[Page]:
    """A page of a fresh profile; afterwards nothing may have gone wrong in its scripts."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        context = await browser.new_context(
            base_url=url, viewport={"width": 1280, "height": 860}, color_scheme="dark" if scheme == "dark" else "light"
        )
        context.set_default_timeout(30_000)
        page = await context.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        if log_in:
            await page.goto("/login?next=/")
            await page.get_by_label("Your name").fill("Ada")
            await page.get_by_label("Token").fill(TOKEN)
            await page.get_by_role("button", name="Log in").click()
            await page.get_by_role("heading", name="The state of the books").wait_for()
        yield page
        await browser.close()
        expected = ("status of 403", "status of 404", "status of 409", "status of 503")
        assert [each for each in problems if not any(status in each for status in expected)] == []


async def shoot(page: Page, name: str, height: int = 860) -> None:
    """Keep what the upper part of the page looks like."""
    await page.screenshot(path=SHOTS / f"{name}.png", clip={"x": 0, "y": 0, "width": 1280, "height": height})
