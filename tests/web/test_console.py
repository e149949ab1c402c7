"""The console in a real browser on a running stack: what an operator sees and does."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Page, expect

from tests.topology import Topology
from tests.web.browser import needs_chromium, open_console, shoot
from tests.web.world import price, trade, until

pytestmark = needs_chromium
expect.set_options(timeout=30_000)
SERIOUS = ("serious", "critical")


@asynccontextmanager
async def paused(running: Topology, web: aiohttp.ClientSession) -> AsyncIterator[None]:
    """No reset begins meanwhile; afterwards everything comes right."""
    await limit(web, paused=True)
    try:
        yield
    finally:
        await limit(web, paused=False)
    await running.settle()


async def limit(web: aiohttp.ClientSession, **wanted: Any) -> None:
    async with web.post("/api/limit", json=wanted) as response:
        assert response.status == 200


async def confirm(page: Page, link: str, button: str) -> None:
    """An action and its confirmation."""
    await page.get_by_role("link", name=link).click()
    await page.get_by_role("button", name=button).click()


async def test_an_operator_follows_and_steers_a_correction(running: Topology, web: aiohttp.ClientSession) -> None:
    holders = [f"HOLDER-{number:03}" for number in range(300)]
    await running.send([price("HERD", 1, 10), *(trade(holder, "HERD", 1, 7, 1) for holder in holders)])
    await running.settle()
    async with open_console(running.stack.worker_url("triggers")) as page:
        await expect(page.get_by_text("The books are right.")).to_be_visible()
        await confirm(page, "Pause…", "Pause")
        await expect(page.locator("#limit")).to_have_text("paused")

        await running.send([price("HERD", 4, 12)])
        row = page.get_by_role("row").filter(has_text="HERD")  # comes by itself: the page is live
        await expect(row).to_contain_text("WAITING")
        await expect(row).to_contain_text("300")
        await shoot(page, "overview-paused")
        await row.get_by_role("link").click()

        await expect(page.get_by_text("resets are paused")).to_be_visible()
        await page.get_by_role("link", name="Set rate…").click()
        await page.get_by_label("Keys per second").fill("2")
        await page.get_by_role("button", name="Set the rate").click()
        await page.get_by_role("link", name="Prioritise…").click()
        await page.get_by_label("Priority").fill("5")
        await page.get_by_role("button", name="Set the priority").click()
        await expect(page.get_by_text("priority 5")).to_be_visible()

        await confirm(page, "Resume…", "Resume")
        done = page.locator("progress").first
        await until(lambda: _between(done, 1, 299), "the bar moves at two keys a second, without a reload")
        await shoot(page, "correction-resetting")
        await page.goto("/")
        await expect(page.locator("#limit")).to_have_text("limit 2 keys/s")
        await shoot(page, "console", 660)  # docs/console.png
        await page.get_by_role("row").filter(has_text="HERD").get_by_role("link").click()
        await confirm(page, "Cancel…", "Cancel the job")
        await expect(page.get_by_text("Held: waits for a requeue")).to_be_visible()
        dirty = await running.pool.fetchval("select count(*) from dirty_keys where security_id = 'HERD'")
        assert dirty > 0  # visibly stale until it is requeued

        await page.goto("/")
        await expect(page.get_by_text("1 correction held.")).to_be_visible()
        await page.get_by_role("link", name="requeues them").click()
        await page.get_by_role("link", name="Correction", exact=False).first.wait_for()
        await page.get_by_role("button", name="Requeue…").click()  # all that match the filter
        await expect(page.get_by_text("1 job", exact=True)).to_be_visible()
        await page.get_by_role("button", name="Requeue the job").click()
        await page.goto("/actions/throttle?back=/corrections%3Fsecurity_id%3DHERD")
        await page.get_by_label("Keys per second").fill("10000")
        await page.get_by_role("button", name="Set the rate").click()
        await running.settle()
        await page.reload()
        newest = page.get_by_role("row").nth(1)
        await expect(newest).to_contain_text("RIGHT")
        await newest.get_by_role("link").click()
        await expect(page.get_by_text("Books right")).to_be_visible()
        await expect(page.locator(".facts")).to_contain_text("right after")
        await page.goto("/corrections?security_id=HERD")
        await page.get_by_role("row").nth(2).get_by_role("link").click()  # the late price itself, before its requeue
        replaced = page.get_by_role("region", name="Prices it replaced").get_by_role("row").nth(1)
        await expect(replaced).to_contain_text("none")
        await expect(replaced).to_contain_text("12")
        changed = page.get_by_role("region", name="What that changed most").get_by_role("row").nth(1)
        await expect(changed).to_contain_text("70")
        await expect(changed).to_contain_text("84")
        await shoot(page, "correction-effect")
        await page.goto("/actions")
        for action in ("pause", "throttle", "prioritise", "resume", "cancel", "requeue"):
            await expect(page.get_by_role("row").filter(has_text=action).first).to_contain_text("Ada")
    audit = await running.audit()
    assert (audit.differences, audit.waiting) == ([], [])


async def _between(bar: Any, low: int, high: int) -> bool:
    return low <= float(await bar.get_attribute("value") or 0) <= high


async def test_a_key_with_its_epochs_and_values(running: Topology) -> None:
    async with open_console(running.stack.worker_url("triggers")) as page:
        await page.get_by_role("link", name="Keys").click()
        await page.get_by_label("Portfolio").fill("P/1")
        await page.get_by_label("Security").fill("A/B ü")
        await page.get_by_role("button", name="Look up").click()
        await expect(page.get_by_role("heading", name="A/B ü in P/1")).to_be_visible()
        await expect(page.get_by_text("no provisional dates")).to_be_visible()
        latest = page.locator("details").filter(has_text="Epoch 1")
        await expect(latest).to_contain_text("quantity +2, cost +20")
        await expect(latest).to_contain_text("Came in: P/1-A/B ü-3")
        await expect(page.get_by_text("Epoch 0")).to_be_visible()
        key = "portfolio_id = 'P/1' and security_id = 'A/B ü'"
        await running.pool.execute(f"update position_state set watermark_date = '2025-01-07' where {key}")
        try:
            await page.reload()
            await expect(page.get_by_text("3 dates provisional")).to_be_visible()
            await expect(page.locator("rect.provisional")).to_be_visible()
            await page.get_by_text("values as a table").click()
            await expect(page.get_by_role("row").filter(has_text="2025-01-08")).to_contain_text("provisional")
            await expect(page.get_by_role("row").filter(has_text="2025-01-07")).not_to_contain_text("provisional")
            await page.get_by_text("values as a table").click()
            await shoot(page, "key")
        finally:
            await running.pool.execute(f"update position_state set watermark_date = '2025-01-10' where {key}")


async def test_the_trigger_table_against_the_ledger(running: Topology, web: aiohttp.ClientSession) -> None:
    async with paused(running, web), open_console(running.stack.worker_url("triggers")) as page:
        await running.send([price("LOOK UP", 5, 1), price("<b>bold</b>", 5, 1)])

        async def listed() -> bool:
            await page.goto("/tables")
            found = [await page.get_by_role("row").filter(has_text=t).count() for t in ("LOOK UP", "<b>bold</b>")]
            return found == [1, 1]

        await until(listed, "the entries")
        await expect(page.get_by_role("link", name="<b>bold</b>")).to_be_visible()
        await shoot(page, "trigger-table")
        await page.get_by_role("textbox", name="Security").fill("LOOK UP")
        await page.get_by_role("button", name="Look up").click()
        await expect(page.get_by_text("agrees", exact=True)).to_be_visible()
        await expect(page.get_by_text(running.stack.worker_url("triggers"))).to_be_visible()
        await expect(page.get_by_text("from 2025-01-05, since")).to_be_visible()


async def test_a_dead_letter_is_repaired_and_sent_again(running: Topology) -> None:
    await running.send(
        [("prices", json.dumps({"security_id": "TYPO", "price_date": "2025-13-01", "price": 5}).encode())]
    )
    await running.settle()
    async with open_console(running.stack.worker_url("triggers")) as page:

        async def listed() -> bool:
            await page.goto("/dead-letters?reason=invalid")
            return await page.get_by_role("row").filter(has_text="month must be").count() == 1

        await until(listed, "the letter")
        await page.get_by_role("row").filter(has_text="month must be").get_by_role("link").click()
        record = page.get_by_label("The record")
        await expect(record).to_have_value('{"security_id": "TYPO", "price_date": "2025-13-01", "price": 5}')
        await page.get_by_role("button", name="Send again").click()
        await expect(page.get_by_role("alert")).to_contain_text("it would be refused again: invalid: price_date")
        await shoot(page, "dead-letter")
        await record.fill('{"security_id": "TYPO", "price_date": "2025-01-03", "price": 5}')
        await page.get_by_role("button", name="Send again").click()
        await expect(page.get_by_text("Sent again by Ada")).to_be_visible()
        running._sent += 1
    await running.settle()
    assert await running.pool.fetchval("select price from market_prices where security_id = 'TYPO'") == 5


PAGES = ["/", "/corrections", "/corrections/1", "/keys", "/tables", "/tables?security_id=X", "/dead-letters",
         "/actions", "/actions/throttle", "/actions/cancel?status=OPEN", "/dead-letters/0/99999", "/login",
         f"/portfolios/{quote('P/1', safe='')}/securities/{quote('A/B ü')}"]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_nothing_stands_in_the_way_of_anybody(running: Topology, scheme: str) -> None:
    """axe-core; everything can be reached by keyboard; the page fits a narrow screen."""
    async with open_console(running.stack.worker_url("triggers"), scheme=scheme) as page:
        found = {}
        for path in PAGES:
            await page.goto(path)
            result = await Axe().run(page)
            serious = [rule for rule in result.response["violations"] if rule["impact"] in SERIOUS]
            if serious:
                found[path] = [(rule["id"], [node["html"][:120] for node in rule["nodes"]][:3]) for rule in serious]
            await page.set_viewport_size({"width": 390, "height": 800})
            assert await page.evaluate("document.documentElement.scrollWidth") <= 390, path
            await page.set_viewport_size({"width": 1280, "height": 860})
        assert found == {}
        await page.goto("/")
        await page.keyboard.press("Tab")
        await expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
        await page.keyboard.press("Enter")
        await page.keyboard.press("Tab")
        await expect(page.get_by_role("button", name="Set rate…")).to_be_focused()
        await shoot(page, f"overview-{scheme}")


async def test_nothing_is_loaded_from_elsewhere(running: Topology) -> None:
    url = running.stack.worker_url("triggers")
    asked: set[str] = set()
    async with open_console(url, log_in=False) as page:
        page.on("request", lambda request: asked.add(request.url.split("/")[2]))
        await page.goto("/login")
        await page.wait_for_load_state("networkidle")
    assert asked == {url.removeprefix("http://")}
