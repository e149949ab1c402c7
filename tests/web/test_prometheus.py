"""Alert rules, the dashboard and the metrics page: checked by promtool, against the code, and in a real Prometheus."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase
from ruamel.yaml import YAML

from deploy.local.ports import Ports
from streams import metrics
from tests.topology import Topology
from tests.web import hours
from tests.web.world import TOKEN, price, trade, until

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus"
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/tidemark.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="PROMETHEUS IS NOT INSTALLED: run tests/web/install-packages.sh as root",
)


def rules() -> list[dict[str, Any]]:
    (group,) = YAML(typ="safe").load(RULES / "alerts.yml")["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


@needs_prometheus
@pytest.mark.parametrize("command", ["check rules alerts.yml", f"test rules alerts_test.yml {hours.NAME}"])
def test_promtool_agrees_with_the_rules(command: str, tmp_path: Path) -> None:
    shutil.copy(RULES / "alerts.yml", tmp_path)
    result = promtool(tmp_path, command)
    assert result.returncode == 0, result.stdout + result.stderr


def promtool(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """In a folder with rules, which the tests are put beside."""
    shutil.copy(RULES / "alerts_test.yml", folder)
    hours.write(folder)
    return subprocess.run(["promtool", *command.split()], cwd=folder, capture_output=True, text=True)


def test_every_alert_is_made_to_fire_by_some_test() -> None:
    asked = [
        each
        for hour in YAML(typ="safe").load(RULES / "alerts_test.yml")["tests"]
        for each in hour["alert_rule_test"]
        if each["exp_alerts"]
    ]
    fired = {each["alertname"] for each in asked} | {alert for alert, _ in hours.DISASTERS.values()}
    assert fired == {rule["alert"] for rule in rules()}


def test_every_alert_has_a_section_of_the_runbook() -> None:
    sections = set(re.findall(r"^## (\w+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE))
    assert sections == {rule["alert"] for rule in rules()}
    for rule in rules():
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_the_metrics_page_is_true() -> None:
    rows = {}
    page, *_ = (ROOT / "docs/metrics.md").read_text().split("\n## ")
    for line in page.splitlines():
        if line.startswith("| `"):
            name, kind, unit, labels, meaning, source = (cell.strip() for cell in line.strip("|").split("|"))
            assert unit
            assert source
            rows[name.strip("`")] = (kind, labels, meaning)
    code = {
        found._name + ("_total" if found._type == "counter" else ""): (
            found._type,
            ", ".join(found._labelnames),
            found._documentation,
        )
        for found in list(REGISTRY._collector_to_names)
        if isinstance(found, MetricWrapperBase)
    }
    code |= {name: ("gauge", "", meaning) for name, meaning in metrics.Cluster.HELP.items()}
    labels = "consumergroup, topic, partition"
    code |= {name: ("gauge", labels, meaning) for name, meaning in metrics.Cluster.LAG_HELP.items()}
    assert rows == code


@needs_prometheus
async def test_every_query_finds_something_in_a_real_prometheus(running: Topology, folder: Path) -> None:
    async with prometheus(running, folder) as web:
        await running.send([("prices", b"{"), price("PROM", 1, 10), trade("P", "PROM", 1, 1, 1)])
        await running.settle()
        await running.send([price("PROM", 2, 11), trade("P", "PROM", 2, 1, 1)])
        await running.settle()
        silent = {query for query in QUERIES if "reprocessing_reset_rate" in query}
        for query in QUERIES:

            async def found(query: str = query) -> Any:
                return await ask(web, query.replace("$__rate_interval", "1m"))

            if query not in silent:
                await until(found, query)
        for rule in rules():
            await ask(web, rule["expr"])
        firing = (await (await web.get("/api/v1/rules")).json())["data"]["groups"][0]["rules"]
        assert {rule["name"]: rule["health"] for rule in firing} == {rule["alert"]: "ok" for rule in rules()}
        values = await until(lambda: ask(web, "count(kafka_consumergroup_lag) by (instance)"), "lag")
        assert len(values) == 1  # one observer


async def ask(web: aiohttp.ClientSession, query: str) -> Any:
    async with web.get("/api/v1/query", params={"query": query}) as response:
        body = await response.json()
    assert body["status"] == "success", (query, body)
    return body["data"]["result"]


@asynccontextmanager
async def prometheus(running: Topology, folder: Path) -> AsyncIterator[aiohttp.ClientSession]:
    """With the repository's configuration, but for where the workers are and how often it looks."""
    home = folder / "prometheus"
    home.mkdir()
    yaml = YAML(typ="safe")
    config = yaml.load(RULES / "prometheus.yml")
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (scrape,) = config["scrape_configs"]
    targets = [running.stack.worker_url(role).removeprefix("http://") for role in running.stack.workers]
    scrape["static_configs"] = [{"targets": targets}]
    scrape["authorization"]["credentials_file"] = str(home / "token")
    (home / "token").write_text(TOKEN)
    shutil.copy(RULES / "alerts.yml", home)
    yaml.dump(config, home / "prometheus.yml")
    port = Ports(folder / "ports.json").choose("prometheus", None)
    arguments = [f"--config.file={home}/prometheus.yml", f"--storage.tsdb.path={home}/data"]
    with (home / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            "prometheus", *arguments, f"--web.listen-address=127.0.0.1:{port}", stdout=log, stderr=log
        )
    try:
        async with aiohttp.ClientSession(base_url=f"http://127.0.0.1:{port}") as web:

            async def up() -> bool:
                try:
                    return len(await ask(web, "up == 1")) == len(targets)
                except (aiohttp.ClientError, AssertionError, ValueError):
                    return False

            await until(up, f"targets up, see {home}/log")
            yield web
    finally:
        process.terminate()
        await process.wait()
