"""The API: what its OpenAPI document says, with ids of any characters, paging, errors, and who may act."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import jsonschema
import msgspec
import pytest
from click.testing import CliRunner

from streams.settings import SettingsError, load_named
from tests.topology import Topology
from tests.web.world import TOKEN, price, trade, until
from tidemark.main import main

SECURITY = "A/B ü"
KEY = f"/api/portfolios/{quote('P/1', safe='')}/securities/{quote(SECURITY, safe='')}"
DOCUMENT: dict[str, Any] = msgspec.json.decode(resources.files("streams.web").joinpath("openapi.json").read_bytes())


def check(path: str, status: int, body: Any, method: str = "get") -> None:
    """The answer is what the document says."""
    answer = DOCUMENT["paths"][path][method]["responses"][str(status)]
    (content,) = answer["content"].values()
    schema = {**content["schema"], "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(schema).validate(body)


async def get(web: aiohttp.ClientSession, path: str, status: int = 200, **headers: str) -> Any:
    async with web.get(aiohttp.client.URL(path, encoded=True), headers=headers) as response:
        assert response.status == status, (path, response.status, await response.text())
        kind = "application/json" if status < 400 else "application/problem+json"
        assert response.content_type == kind
        return msgspec.json.decode(await response.read())


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ("/api/openapi.json", "/api/openapi.json"),
        ("/api/triggers", "/api/triggers"),
        ("/api/securities/{security_id}", f"/api/securities/{quote(SECURITY, safe='')}"),
        ("/api/portfolios/{portfolio_id}/securities/{security_id}", KEY),
        ("/api/corrections", "/api/corrections"),
        ("/api/corrections", "/api/corrections?status=RIGHT&security_id=" + quote(SECURITY, safe="")),
        ("/api/jobs", "/api/jobs?status=COMPLETE"),
        ("/api/limit", "/api/limit"),
        ("/api/lag", "/api/lag"),
        ("/api/workers", "/api/workers"),
        ("/api/actions", "/api/actions"),
        ("/api/dead-letters", "/api/dead-letters"),
    ],
)
async def test_answers_are_as_documented(web: aiohttp.ClientSession, template: str, path: str) -> None:
    check(template, 200, await get(web, path))


async def test_one_correction_and_its_job(web: aiohttp.ClientSession) -> None:
    found = await get(web, f"/api/securities/{quote(SECURITY, safe='')}")
    assert (found["security_id"], found["open"], found["phase"], found["dates_left"]) == (SECURITY, 0, "RIGHT", 0)
    late = next(each for each in found["corrections"] if each["reason"] == "price" and each["job_id"])
    assert (late["keys_total"], late["keys_done"]) == (1, 1)
    correction = await get(web, f"/api/corrections/{late['seq']}")
    check("/api/corrections/{seq}", 200, correction)
    check("/api/jobs/{job_id}", 200, await get(web, f"/api/jobs/{late['job_id']}"))


async def test_a_correction_tells_values_before_and_after(running: Topology, web: aiohttp.ClientSession) -> None:
    short = trade("SHORT", "REVISED", 1, 3, 1, transaction_type="SELL")
    await running.send([price("REVISED", 2, "10.5"), trade("LARGE", "REVISED", 1, 30, 1), short])
    await running.settle()
    await running.send([price("REVISED", 4, 12), price("REVISED", 2, "11")])
    await running.settle()
    newest = (await get(web, "/api/corrections?security_id=REVISED"))[0]
    effect = await get(web, f"/api/corrections/{newest['seq']}/effect")
    check("/api/corrections/{seq}/effect", 200, effect)
    assert effect == {
        "prices": [
            {"price_date": "2025-01-02", "price_before": 10.5, "price_after": 11},
            {"price_date": "2025-01-04", "price_before": None, "price_after": 12},
        ],
        "holders": [
            {"portfolio_id": "LARGE", "valuation_date": "2025-01-02", "quantity": 30, "market_value_before": 315,
             "market_value_after": 330},
            {"portfolio_id": "SHORT", "valuation_date": "2025-01-02", "quantity": -3, "market_value_before": -31.5,
             "market_value_after": -33},
        ],
    }  # fmt: skip
    other = next(each for each in await get(web, "/api/corrections?limit=1000") if each["reason"] == "transaction")
    effect = await get(web, f"/api/corrections/{other['seq']}/effect")
    check("/api/corrections/{seq}/effect", 200, effect)
    assert effect["prices"] == []
    check("/api/corrections/{seq}/effect", 404, await get(web, "/api/corrections/999999999/effect", 404))


async def test_a_key_has_its_history(web: aiohttp.ClientSession) -> None:
    found = await get(web, KEY)
    assert (found["portfolio_id"], found["security_id"], found["epoch"], found["status"]) == (
        "P/1",
        SECURITY,
        1,
        "CURRENT",
    )
    assert [row["quantity"] for row in found["history"]] == [10, 12, 17]


@pytest.mark.parametrize(
    ("template", "path", "status"),
    [
        ("/api/triggers/{security_id}", "/api/triggers/never-heard-of", 404),
        ("/api/securities/{security_id}", "/api/securities/never-heard-of", 404),
        ("/api/portfolios/{portfolio_id}/securities/{security_id}", "/api/portfolios/x/securities/y%2Fz", 404),
        ("/api/corrections/{seq}", "/api/corrections/999999", 404),
        ("/api/jobs/{job_id}", "/api/jobs/999999", 404),
        ("/api/triggers", "/api/triggers?limit=0", 400),
        ("/api/triggers", "/api/triggers?limit=many", 400),
        ("/api/jobs", "/api/jobs?status=LOST", 400),
        ("/api/jobs", "/api/jobs?cursor=99999999999999999999", 400),
        ("/api/corrections", "/api/corrections?older_than_seconds=-1", 400),
        ("/api/dead-letters", "/api/dead-letters?reason=bad", 400),
    ],
)
async def test_errors_are_problems(web: aiohttp.ClientSession, template: str, path: str, status: int) -> None:
    body = await get(web, path, status)
    check(template, status, body)
    assert (body["status"], body["instance"]) == (status, path)


async def test_every_route_is_in_the_document_and_nothing_else() -> None:
    text = resources.files("streams.web").joinpath("api.py").read_text()
    routes = set(re.findall(r'(get|post)\("(/api/[^"]+)"', text.replace(":[^/]+", "")))
    expanded = {
        (method, path.replace("{action:cancel|requeue|prioritise}", action))
        for method, path in routes
        for action in (("cancel", "requeue", "prioritise") if "action:" in path else ("",))
    }
    assert expanded == {(method, path) for path, methods in DOCUMENT["paths"].items() for method in methods}


async def test_pages_of_the_table_and_of_jobs_join_up(running: Topology, web: aiohttp.ClientSession) -> None:
    securities = [f"PAGE/{number}" for number in range(7)]
    await set_limit(web, paused=True)
    try:
        await running.send([price(security, 5, 10) for security in securities])

        async def in_flight() -> bool:
            found = {row["security_id"] for row in await get(web, "/api/triggers")}
            return found >= set(securities)

        await until(in_flight, "jobs in flight")
        whole = await get(web, "/api/triggers")
        check("/api/triggers", 200, whole)
        pages: list[Any] = []
        path: str | None = "/api/triggers?limit=2"
        while path:
            async with web.get(aiohttp.client.URL(path, encoded=True)) as response:
                rows = await response.json()
                link = re.match(r'<(.*)>; rel="next"', response.headers.get("Link", ""))
            assert len(rows) <= 2
            pages += rows
            path = link[1] if link else None
        assert pages == whole
        entry = await get(web, f"/api/triggers/{quote(securities[3], safe='')}")
        check("/api/triggers/{security_id}", 200, entry)
        assert entry["in_flight"]["earliest_impacted_date"] == "2025-01-05"
    finally:
        await set_limit(web, paused=False)
    await running.settle()

    async def released() -> bool:
        async with web.get("/api/triggers", params={"security_id": securities[3]}) as response:
            return response.status == 200 and await response.json() == []

    await until(released, "the table has heard of the job's end")
    await get(web, f"/api/triggers/{quote(securities[3], safe='')}", 404)
    first = await get(web, "/api/jobs?limit=3")
    second = await get(web, f"/api/jobs?limit=3&cursor={first[-1]['job_id']}")
    assert [row["job_id"] for row in first + second] == [row["job_id"] for row in await get(web, "/api/jobs?limit=6")]


async def test_an_operator_cancels_requeues_and_prioritises(running: Topology, web: aiohttp.ClientSession) -> None:
    await running.send([price("OPER", 1, 10), trade("P", "OPER", 1, 1, 1)])
    await running.settle()
    await set_limit(web, paused=True)
    try:
        await running.send([price("OPER", 4, 12)])

        async def job() -> Any:
            return await get(web, "/api/jobs?security_id=OPER&status=PENDING")

        (found,) = await until(job, "the job")
        path = f"/api/jobs/{found['job_id']}"
        after = await post(web, f"{path}/prioritise", {"priority": 7})
        check("/api/jobs/{job_id}/prioritise", 200, after, "post")
        assert after["priority"] == 7
        assert (await post(web, f"{path}/prioritise", {"priority": "high"}, 400))["type"].endswith("invalid")
        assert (await post(web, f"{path}/requeue", {}, 409))["type"].endswith("refused")
        assert (await post(web, f"{path}/cancel"))["status"] == "CANCELLED"
        held = await get(web, "/api/corrections?status=HELD&security_id=OPER")
        assert [row["status"] for row in held] == ["HELD"]
        assert (await post(web, f"{path}/requeue"))["status"] == "CANCELLED"
    finally:
        await set_limit(web, paused=False)
    await running.settle()
    actions = await get(web, "/api/actions")
    assert {row["actor"] for row in actions} >= {"tests"}
    assert {row["action"] for row in actions} >= {"pause", "resume", "cancel", "requeue", "prioritise"}


async def test_a_dead_letter_is_sent_again_after_repair(running: Topology, web: aiohttp.ClientSession) -> None:
    await running.send([("prices", b'{"security_id": "MEND", "price_date": "2025-01-02", "price": -1}')])
    await running.settle()

    async def letter() -> Any:
        found = await get(web, "/api/dead-letters?reason=invalid")
        return next((row for row in found if row["value"] and "MEND" in row["value"]), None)

    found = await until(letter, "the dead letter")
    assert (found["topic"], found["is_text"], found["resubmitted_by"]) == ("prices", True, None)
    path = f"/api/dead-letters/{found['partition']}/{found['offset']}/resubmit"
    refused = await post(web, path, {}, 409)
    assert "it would be refused again" in refused["detail"]
    await post(web, path, {"value": '{"security_id": "MEND", "price_date": "2025-01-02", "price": 42}'})
    running._sent += 1

    async def stored() -> Any:
        return await running.pool.fetchval("select price from market_prices where security_id = 'MEND'")

    assert await until(stored, "the price") == 42
    await running.settle()
    assert (await letter())["resubmitted_by"].startswith("tests at ")
    await post(web, "/api/dead-letters/0/999999/resubmit", {}, 404)


# -- who may do what ---------------------------------------------------------------------------------------------------


async def test_without_the_token_there_is_nothing_but_probes(stranger: aiohttp.ClientSession) -> None:
    for path in ("/healthz", "/readyz"):
        async with stranger.get(path) as response:
            assert response.status == 200
    for path in (
        "/api/triggers",
        "/metrics",
        "/",
        "/corrections",
        "/table/triggers/X/",
        "/router/",
        "/api/openapi.json",
    ):
        async with stranger.get(path) as response:
            assert response.status == 401, path
            assert response.headers["WWW-Authenticate"].startswith("Bearer")
    async with stranger.get("/metrics", headers={"Authorization": "Bearer wrong"}) as response:
        assert response.status == 401
    async with stranger.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"}) as response:
        assert response.status == 200
    async with stranger.post("/api/limit", json={"paused": True}) as response:
        assert response.status == 401


async def test_a_session_acts_only_from_its_own_pages(running: Topology) -> None:
    origin = running.stack.worker_url("triggers")
    jar = aiohttp.CookieJar(unsafe=True)
    async with aiohttp.ClientSession(base_url=origin, cookie_jar=jar) as browser:
        async with browser.get("/corrections", headers={"Accept": "text/html"}, allow_redirects=False) as response:
            assert (response.status, response.headers["Location"]) == (303, "/login?next=/corrections")
        form = {"name": "Ada", "token": "wrong", "next": "/corrections"}
        own = {"Origin": origin}
        async with browser.post("/login", data=form, headers=own) as response:
            assert response.status == 403
        async with browser.post("/login", data={**form, "token": TOKEN}) as response:
            assert response.status == 403  # no Origin
        good = {**form, "token": TOKEN}
        async with browser.post(
            "/login", data={**good, "next": "//elsewhere.example"}, headers=own, allow_redirects=False
        ) as r:
            assert (r.status, r.headers["Location"]) == (303, "/")
            cookie = r.headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert TOKEN not in cookie
        async with browser.get("/corrections") as response:
            assert response.status == 200
            assert "default-src 'self'" in response.headers["Content-Security-Policy"]
        for headers in ({}, {"Origin": "http://elsewhere.example"}, {"Origin": "null"}):
            async with browser.post("/actions/resume", data={"back": "/"}, headers=headers) as response:
                assert response.status == 403, headers
        async with browser.post("/actions/resume", data={"back": "/"}, headers=own, allow_redirects=False) as response:
            assert response.status == 303
        async with browser.post("/logout", headers=own, allow_redirects=False) as response:
            assert response.status == 303
        async with browser.get("/corrections") as response:
            assert response.status == 401


async def test_a_forged_or_expired_session_is_nobody(running: Topology) -> None:
    async with aiohttp.ClientSession(base_url=running.stack.worker_url("triggers")) as browser:
        for cookie in ("9999999999.Ada.0000", "9999999999.Ada", "", "x.y.z", "1.Ada." + "0" * 64):
            async with browser.get("/api/jobs", headers={"Cookie": f"tidemark_session={cookie}"}) as response:
                assert response.status == 401, cookie


async def test_what_is_not_there_and_what_is_not_allowed(web: aiohttp.ClientSession) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("POST", "/api/lag", 405),
        ("GET", "/static/..%2Fapi.py", 404),
    ):
        async with web.request(method, aiohttp.client.URL(path, encoded=True)) as response:
            assert response.status == status
            assert response.content_type == "application/problem+json"


async def test_workers_refuse_an_open_address_without_a_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("0.0.0.0", "::", "10.0.0.7", "example.org"):
        with pytest.raises(SettingsError, match="TIDEMARK_WEB_TOKEN"):
            load_named(web_host=host).check_web()
        load_named(web_host=host, web_token="x").check_web()
    load_named(web_host="127.0.0.1").check_web()
    monkeypatch.setenv("TIDEMARK_WEB_HOST", "0.0.0.0")
    monkeypatch.setenv("TIDEMARK_BROKER_URL", "kafka://127.0.0.1:1")
    monkeypatch.setenv("TIDEMARK_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/x")
    for command in (["worker", "triggers"], ["up"], ["up", "--detach"]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1
        assert re.fullmatch(r"Error: TIDEMARK_WEB_HOST is 0\.0\.0\.0: set TIDEMARK_WEB_TOKEN too.*\n", result.output)


async def set_limit(web: aiohttp.ClientSession, **wanted: Any) -> None:
    check("/api/limit", 200, await post(web, "/api/limit", wanted), "post")


async def post(web: aiohttp.ClientSession, path: str, body: Any = None, status: int = 200) -> Any:
    async with web.post(path, json=body or {}) as response:
        assert response.status == status, await response.text()
        return msgspec.json.decode(await response.read())
