"""Whatever a request is made of, with the token or without: an answer below 500, one line in the log, on this site."""

from __future__ import annotations

import asyncio
import gzip
import html
import json
import re
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
import psutil
import pytest
from aiokafka import AIOKafkaProducer
from confluent_kafka import Producer
from yarl import URL

from tests.topology import Topology
from tests.web.raw import Answer, send
from tests.web.world import TOKEN, price, trade

BEARER = {"Authorization": f"Bearer {TOKEN}"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
JSON = {"Content-Type": "application/json"}
BIG = "9" * 4_000
MIB = 2**20

QUERIES = [
    f"/api/jobs?cursor={BIG}",
    f"/api/jobs?limit={BIG}",
    f"/api/jobs/{BIG}",
    f"/corrections/{BIG}",
    "/corrections?cursor=x",
    "/api/corrections?older_than_seconds=9223372036854775807",
    "/corrections?older_than_seconds=9223372036854775807",
    "/api/corrections?security_id=%00",
    "/api/jobs?security_id=%00",
    "/tables?security_id=%00",
    "/tables?cursor=%00",
    "/corrections?security_id=%00",
    "/api/triggers?security_id=%00",
    "/api/triggers?security_id=%FF",
    "/api/triggers/%FF",
    "/api/triggers?cursor=%00",
    "/api/triggers?cursor=%FF%FE",
    "/api/triggers/%ED%A0%80",
    "/api/securities/%ED%A0%80",
    "/api/securities/%00",
    "/portfolios/%FF/securities/%FF",
    "/keys?portfolio_id=%00&security_id=a",
    "/keys?portfolio_id=%0d%0aX:y&security_id=a",
    f"/actions/cancel?job_id={BIG}",
    "/actions/cancel?job_id=-1",
    "/actions/cancel?status=OPEN&security_id=%00",
    "/api/dead-letters?limit=-1",
    "/api/dead-letters?limit=1e3",
    "/api/dead-letters?limit=%D9%A3",
    "/api/dead-letters?cursor=x",
    f"/api/dead-letters?cursor={BIG}",
    "/dead-letters?cursor=9999999999999999999",
    "/dead-letters?cursor=0-0-0-0-0-0",
    "/dead-letters/9223372036854775807/0",
    "/dead-letters/3000000000/0",
    "/dead-letters/0/9223372036854775807",
    "/api/dead-letters/0/99999999999999999999",
    "/api/actions?limit=10001",
    "/api/jobs?status=x",
    "/api/corrections?cursor=abc",
    "/api/jobs/9223372036854775807",
    "/api/corrections/0/effect?limit=10000",
    "/api/corrections/%D9%A3",
    "/router/nope/",
    "/router/nope/x/",
    "/table/nope/x/",
    "/table/nope/",
    "/router/triggers/%FF/",
    "/table/triggers/a%0Ab/",
    "/events/overview/x",
    "/static/%00",
    "/actions/%00",
    "/actions/pause?back=//elsewhere.example",
    "//elsewhere.example/x",
    "/" + "a" * 7_000,
    "*",
]
BODIES = [
    ("/api/limit", body)
    for body in (
        '{"rows_per_second": NaN}',
        '{"rows_per_second": Infinity}',
        '{"rows_per_second": -1}',
        '{"rows_per_second": 0}',
        '{"rows_per_second": 1e-300}',
        '{"rows_per_second": 1e308}',
        '{"rows_per_second": 1e400}',
        '{"rows_per_second": 0.9}',
        '{"rows_per_second": 1' + "0" * 400 + "}",
        "[" * 100_000,
        '{"a":' * 50_000,
        '{"paused": "x"}',
        "[]",
        '{"paused":1}',
        b"\xff\xfe",
        '{"paused": null}',
        '{"unheard": 1}',
        '{"\\ud800": 1}',
        '{"rows_per_second": true}',
        "{}",
    )
] + [
    ("/api/jobs/1/prioritise", '{"priority":1.5}'),
    ("/api/jobs/1/prioritise", '{"priority":' + BIG + "}"),
    ("/api/jobs/1/delete", "{}"),
    (f"/api/jobs/{BIG}/cancel", "{}"),
    ("/api/jobs/9223372036854775807/requeue", "{}"),
    ("/api/dead-letters/0/0/resubmit", '{"value":"\\ud800"}'),
    ("/api/dead-letters/0/0/resubmit", '{"value":1}'),
    ("/api/dead-letters/99999999999/0/resubmit", "{}"),
    ("/api/dead-letters/77/0/resubmit", "{}"),
]
FORMS = [
    ("/actions/prioritise", "priority=--5&job_id=1"),
    ("/actions/prioritise", f"priority=5&job_id={'9' * 25}"),
    ("/actions/throttle", "rows_per_second=nan"),
    ("/actions/throttle", "rows_per_second=inf"),
    ("/actions/throttle", "rows_per_second=1e400"),
    ("/actions/throttle", "rows_per_second=1e-300"),
    ("/actions/throttle", ""),
    ("/actions/nope", "x=1"),
    ("/actions/prioritise", f"priority={BIG}&status=OPEN"),
    ("/actions/cancel", "status=OPEN&security_id=%00"),
    ("/dead-letters/0/0", "value=%ff"),
    ("/dead-letters/0/0", "value=%00"),
    ("/actions/pause", "&".join(f"f{n}=1" for n in range(500))),
    ("/actions/pause", b"back=\xff"),
]


def log(running: Topology) -> list[dict[str, Any]]:
    path = running.settings.data_dir / "logs" / "triggers.log"
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def complaints(lines: list[dict[str, Any]]) -> str:
    """The ends of those that are errors, or have a trace."""
    return "\n".join(str(line)[-700:] for line in lines if line["level"] in ("ERROR", "CRITICAL") or "error" in line)


def refused(answer: Answer, what: object) -> None:
    assert 300 <= answer.status < 500, (what, answer.status, answer.body[:300])


async def test_nobody_makes_a_worker_stumble_without_the_token(running: Topology) -> None:
    url = running.stack.worker_url("triggers")
    before = len(log(running))
    forged = "%0A[2026-11-30%2000:00:00,000]%20[1]%20[INFO]%20FORGED"
    cookie = "tidemark_session="
    for method, path, headers in (
        ("GET", f"/x{forged}", {"Cookie": cookie.encode() + b"1.A.\xc3\xa9"}),
        ("GET", f"/y{forged}", {"Host": "["}),
        ("GET", f"/y{forged}", {"Host": "[", "Accept": "text/html"}),
        ("GET", "/", {"Cookie": cookie.encode() + b"1.\xff\xfe." + b"0" * 64}),
        ("GET", "/", {"Cookie": cookie + "9" * 5_000 + ".A." + "0" * 64}),
        ("GET", "/", {"Authorization": b"Bearer \xff\xfe"}),
        ("GET", "/", {"Authorization": b"Bearer \xc3\xa9"}),
        ("GET", "/", {"Authorization": "Bearer"}),
        ("GET", b"/\xff\xfe", {}),
        ("GET", b"/\xff\xfe", {"Accept": "text/html"}),
        ("GET", b"/?a=\xff", {"Accept": "text/html"}),
        ("GET", "/login?next=%00", {}),
        ("GET", "/healthz/../api/jobs", {}),
        ("GET", "http://[/", {}),
        ("TRACE", "/api/jobs", {}),
        ("PROPFIND", "/", {}),
    ):
        answer = await send(url, method, path, headers)
        assert answer.status < 500, (path, headers, answer.body[:300])
    for headers, body in (
        ({"Origin": "http://["}, "a=b"),
        ({"Origin": url, "Content-Type": "application/x-www-form-urlencoded; charset=nope"}, "name=A&token=x"),
        ({"Origin": url, "Content-Type": "multipart/form-data"}, "x"),
        ({"Origin": url, "Content-Type": "multipart/form-data; boundary=x"}, "x"),
        ({"Origin": url}, b"name=A&token=\xff"),
        ({"Origin": url}, "name=A&token=%ff%fe"),
        ({"Origin": url}, "name=%00&token=%00&next=%00"),
        ({"Origin": url, "Content-Encoding": "gzip"}, b"no gzip"),
        ({"Host": "["}, "a=b"),
        ({"Host": "", "Origin": ""}, "a=b"),
    ):
        answer = await send(url, "POST", "/login", {**FORM, **headers}, body)
        assert answer.status < 500, (headers, answer.body[:300])
        assert answer.status != 303
    new = log(running)[before:]
    assert (
        "\n".join(str(line)[-700:] for line in new if line["level"] in ("ERROR", "CRITICAL") or "error" in line) == ""
    )


async def test_odd_numbers_and_bytes_are_refused_with_the_token(running: Topology) -> None:
    url = running.stack.worker_url("triggers")
    before = len(log(running))
    for kind in ("application/json", "text/html"):
        for path in QUERIES:
            if path in ("/actions/pause?back=//elsewhere.example", "/dead-letters?cursor=0-0-0-0-0-0"):
                continue
            answer = await send(url, "GET", path, {**BEARER, "Accept": kind})
            assert answer.status < 500, (path[:80], answer.status, answer.body[:300])
    for path, body in BODIES:
        refused(await send(url, "POST", path, {**BEARER, **JSON}, body), (path, body[:60]))
    refused(await send(url, "POST", "/api/limit", {**BEARER, "Content-Encoding": "gzip"}, b"no gzip"), "gzip")
    for path, body in FORMS:
        refused(await send(url, "POST", path, {**BEARER, **FORM}, body), (path, body[:60]))
    new = log(running)[before:]
    assert (
        "\n".join(str(line)[-700:] for line in new if line["level"] in ("ERROR", "CRITICAL") or "error" in line) == ""
    )
    assert not await running.pool.fetchval("select paused from reset_limit")


async def test_bodies_are_limited(running: Topology) -> None:
    url = running.stack.worker_url("triggers")
    bomb = gzip.compress(b" " * 100 * MIB)
    for headers, body in (({}, b" " * 5 * MIB), ({"Content-Encoding": "gzip"}, bomb)):
        for path, form in (("/api/limit", JSON), ("/actions/pause", FORM)):
            answer = await send(url, "POST", path, {**BEARER, **form, **headers}, body)
            assert answer.status in (413, 0), (path, answer.status)  # 0: closed while we still sent
    answer = await send(url, "POST", "/api/limit", {**BEARER, **JSON, "Content-Encoding": "gzip"}, bomb)
    assert (answer.status, json.loads(answer.body)["type"]) == (413, "urn:tidemark:problem:too-large")


async def test_the_reset_rate_has_one_range_down_to_the_database(running: Topology, web: aiohttp.ClientSession) -> None:
    for rate in (1e-300, 0.99, 1.1e9, 1e308):
        async with web.post("/api/limit", json={"rows_per_second": rate}) as response:
            assert response.status == 400
            assert "rows_per_second: expected a number from 1 to 1,000,000,000" in (await response.json())["detail"]
        with pytest.raises(Exception, match="reset_limit"):
            await running.pool.execute("update reset_limit set rows_per_second = $1", rate)
    with pytest.raises(Exception, match="reset_limit_rate_in_range"):
        await running.pool.execute("update reset_limit set rows_per_second = 'NaN'")
    for rate in (1, 1e9, 10_000):
        async with web.post("/api/limit", json={"rows_per_second": rate}) as response:
            assert (await response.json())["rows_per_second"] == rate


async def test_a_login_stays_on_this_site(running: Topology) -> None:
    url = running.stack.worker_url("triggers")
    for target in ("//h", "/\t/h", "/\n/h", "/\\h", "https://h", "/x\r\nA: b", "\t//h", "/\u2028/h"):
        form = urlencode({"name": "Ada", "token": TOKEN, "next": target})
        answer = await send(url, "POST", "/login", {**FORM, "Origin": url}, form)
        assert (answer.status, answer.headers["location"]) == (303, "/"), target
        page = await send(url, "GET", f"/login?next={quote(target, safe='')}", {"Accept": "text/html"})
        assert b'name="next" value="/"' in page.body or page.status == 400
    answer = await send(url, "GET", "//elsewhere.example/x", {**BEARER, "Accept": "text/html"})
    assert b'href="//' not in answer.body


IDS = [
    "{}",
    "{3F2504E0-4F89}",
    "}",
    ".",
    "..",
    "~",
    "~.",
    "~..",
    "...",
    "/",
    "//",
    "a/../b",
    "A%2FB",
    "%",
    "%00",
    "%2e%2e",
    "A B",
    " lead",
    "trail ",
    '"quoted"',
    "it's",
    "<script>alert(1)</script>",
    "?",
    "#",
    "a/b/c?d#e%f",
    "A+B",
    "A&B=C",
    "a\\b",
    "[x]",
    "X[/b]",
    "a|b",
    ";",
    ":",
    "@x",
    "\u202eabc",
    "a\u200bb",
    "Société",
    "日経225",
    "💰",
    "é" * 200,
]


async def test_every_identifier_is_reached_by_path_and_its_links_work(
    running: Topology, web: aiohttp.ClientSession
) -> None:
    await running.send(
        [trade(f"I{each}"[:200], each, n, 1, 1, transaction_id=f"odd-{n}") for n, each in enumerate(IDS)]
    )
    await running.settle()
    await running.send([price(each, 3, n + 1) for n, each in enumerate(IDS)])
    await running.settle()
    accept = {"Accept": "text/html"}
    for each in IDS:
        portfolio = f"I{each}"[:200]
        parameters = {"portfolio_id": portfolio, "security_id": each}
        async with web.get("/keys", params=parameters, headers=accept, allow_redirects=False) as response:
            assert response.status == 303
            place = response.headers["Location"]
        async with web.get(URL(place, encoded=True), headers=accept) as response:
            text = await response.text()
            assert response.status == 200, (each, place)
            assert not {"\u202e", "\u200b"} & set(text)
            assert "<script>alert" not in text
        async with web.get(URL(f"/api{place}", encoded=True)) as response:
            found = await response.json()
            assert (response.status, found["portfolio_id"], found["security_id"]) == (200, portfolio, each)
        path = place.rpartition("/")[2]
        async with web.get(URL(f"/api/securities/{path}", encoded=True)) as response:
            found = await response.json()
            assert (response.status, found["security_id"]) == (200, each)
        assert await released(web, f"/api/triggers/{path}") == f"nothing is in flight or pending for {each}"
        async with web.get(f"/corrections/{found['seq']}", headers=accept) as response:
            text = await response.text()
            (link,) = {html.unescape(each) for each in re.findall(r'href="(/portfolios/[^"]+)"', text)}
            assert link == place
    missing = "/portfolios/a%2Fb/securities/%7B%252F%7D"
    async with web.get(URL(missing, encoded=True), headers=accept) as response:
        assert response.status == 404
        again = re.search(r'href="([^"]*)">Try again', await response.text())
        assert again is not None
        assert URL(html.unescape(again[1]), encoded=True).raw_path == missing


# -- dead letters ------------------------------------------------------------------------------------------------------


async def letters(web: aiohttp.ClientSession, path: str) -> list[dict[str, Any]]:
    """All pages."""
    found: list[dict[str, Any]] = []
    following: str | None = path
    while following:
        async with web.get(URL(following, encoded=True)) as response:
            assert response.status == 200, await response.text()
            found += await response.json()
            link = re.match(r'<(.*)>; rel="next"', response.headers.get("Link", ""))
        following = link[1] if link else None
    return found


async def test_letters_of_others_are_shown_as_what_they_are(running: Topology, web: aiohttp.ClientSession) -> None:
    topic = running.settings.topic("dead-letters")
    own = [("reason", b"invalid"), ("detail", b"d"), ("topic", b"prices")]
    sent: list[dict[str, Any]] = [
        {"value": b"odd-1", "headers": [*own, ("partition", b"zz"), ("offset", b"1")]},
        {"value": b"odd-2", "headers": [("reason", None)]},
        {"value": b"odd-3", "headers": [*own, ("truncated", b"9" * 400)]},
        {"value": b"odd-4", "timestamp": 1},
        {"value": b"odd-5", "headers": [("reason", b"\xff\xfe"), ("detail", "\u202eabc".encode())]},
        {"value": b"odd-6\xff\x00", "key": b"\xff" * 5_000},
        {"value": None, "key": b"odd-7"},
        {"value": b"odd-8" + b"x" * 10_000, "headers": [("reason", b"r" * 10_000)]},
    ]
    producer = Producer({"bootstrap.servers": running.settings.bootstrap_servers})
    for each in sent:
        producer.produce(topic, partition=0, **each)
    assert producer.flush(30) == 0
    hidden = Producer({"bootstrap.servers": running.settings.bootstrap_servers, "transactional.id": "odd"})
    hidden.init_transactions()
    hidden.begin_transaction()
    for number in range(50):
        hidden.produce(topic, partition=0, value=b"never committed %d" % number)
    hidden.flush(30)
    hidden.abort_transaction()  # nothing but a hole at the topic's end

    found = await letters(web, "/api/dead-letters?limit=3")
    places = [(each["partition"], each["offset"]) for each in found]
    assert len(set(places)) == len(places)
    for partition in {partition for partition, _ in places}:
        mine = [offset for each, offset in places if each == partition]
        assert mine == sorted(mine, reverse=True)
    odd = [each for each in found if "odd-" in f"{each['key']}{each['value']}"]
    assert len(odd) == len(sent)
    by_value = {re.findall(r"odd-\d", f"{each['key']}{each['value']}")[0]: each for each in odd}
    assert (by_value["odd-1"]["source_partition"], by_value["odd-1"]["source_offset"]) == (None, 1)
    assert by_value["odd-2"]["reason"] == "unknown"
    assert by_value["odd-4"]["refused_at"].startswith("1970-01-01")
    assert (by_value["odd-6"]["is_text"], by_value["odd-6"]["shortened"]) == (False, True)
    assert (len(by_value["odd-8"]["value"]), by_value["odd-8"]["shortened"]) == (2_000, True)
    for each in odd:
        place = f"{each['partition']}/{each['offset']}"
        async with web.get(f"/api/dead-letters/{place}") as response:
            whole = await response.json()
            assert (response.status, whole["shortened"]) == (200, False)
        async with web.get(f"/dead-letters/{place}", headers={"Accept": "text/html"}) as response:
            assert response.status == 200
        async with web.post(f"/api/dead-letters/{place}/resubmit", json={}) as response:
            assert response.status == 409
    async with web.get("/dead-letters", headers={"Accept": "text/html"}) as response:
        text = await response.text()
        assert response.status == 200
        assert "\u202e" not in text
    hole = max(offset for partition, offset in places if partition == 0) + 1
    for place in (f"0/{hole}", "77/0", "0/99999", "2147483647/0"):
        for path in (f"/dead-letters/{place}", f"/api/dead-letters/{place}"):
            async with web.get(path) as response:
                assert response.status == 404, path


async def test_large_letters_are_read_within_bounded_memory(
    running: Topology, web: aiohttp.ClientSession, record_property: Any
) -> None:
    pid = next(worker["pid"] for worker in await workers(web) if worker["role"] == "triggers")
    process = psutil.Process(pid)
    producer = AIOKafkaProducer(bootstrap_servers=running.settings.bootstrap_servers, max_request_size=2 * MIB)
    await producer.start()
    try:
        headers = [("reason", b"invalid"), ("detail", b"large"), ("topic", b"prices")]
        for number in range(200):
            value = (b"%06d" % number) * 150_000
            await producer.send(running.settings.topic("dead-letters"), value, key=b"%d" % number, headers=headers)
    finally:
        await producer.stop()
    before = peak = process.memory_info().rss
    found: list[dict[str, Any]] = []

    async def watched(path: str) -> None:
        found.extend(await letters(web, path))

    looks = asyncio.gather(*(watched("/api/dead-letters?limit=1000") for _ in range(4)))
    while not looks.done():
        peak = max(peak, process.memory_info().rss)
        await asyncio.sleep(0.02)
    await looks
    async with web.get("/dead-letters", headers={"Accept": "text/html"}) as response:
        assert response.status == 200
        assert "Older" in await response.text()
    grown = (peak - before) / MIB
    record_property("grown_mib", grown)
    print(f"dead letters: {before / MIB:.0f} MiB before, {grown:.0f} MiB more while four read 180 MB each")
    assert sum(each["detail"] == "large" for each in found) == 4 * 200
    large = next(each for each in found if each["detail"] == "large")
    async with web.get(f"/api/dead-letters/{large['partition']}/{large['offset']}") as response:
        assert len((await response.json())["value"]) == 900_000
    assert grown < 200


async def released(web: aiohttp.ClientSession, path: str) -> str:
    """What is said of a security that the trigger table holds no more."""
    async with asyncio.timeout(120):
        while True:
            async with web.get(URL(path, encoded=True)) as response:
                if response.status == 404:
                    detail: str = (await response.json())["detail"]
                    return detail
            await asyncio.sleep(0.05)


async def workers(web: aiohttp.ClientSession) -> list[dict[str, Any]]:
    async with web.get("/api/workers") as response:
        found: list[dict[str, Any]] = await response.json()
        return found
