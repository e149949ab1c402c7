"""JSON logs of real workers: an object per line; a correction can be followed through them and through Kafka."""

from __future__ import annotations

import json
from typing import Any

from tests.topology import Topology
from tests.web.world import price, trade, until


def lines(running: Topology, role: str) -> list[dict[str, Any]]:
    log = running.settings.data_dir / "logs" / f"{role}.log"
    return [json.loads(line) for line in log.read_text().splitlines()]


async def found(running: Topology, role: str, message: str) -> list[dict[str, Any]]:
    """A line comes after the commit that it tells of."""
    return [line for line in lines(running, role) if line["message"].startswith(message)]


async def test_a_correction_can_be_followed(running: Topology) -> None:
    await running.send([price("LOGGED", 1, 10), trade("P", "LOGGED", 1, 1, 1)])
    await running.settle()
    await running.send([price("LOGGED", 4, 12)])
    await running.settle()
    job_id = await running.pool.fetchval("select max(job_id) from reprocessing_jobs where security_id = 'LOGGED'")
    for role in ("intake", "triggers", "resets", "books"):
        assert all({"at", "level", "logger", "message"} <= line.keys() for line in lines(running, role))
    seq = await running.pool.fetchval("select max(seq) from corrections where security_id = 'LOGGED'")
    for role, message in (
        ("intake", f"correction {seq}: late records of prices"),
        ("resets", f"job {job_id} COMPLETE: 1 keys reset"),
        ("books", f"correction {seq}: the books are right"),
    ):
        (line,) = await until(lambda role=role, message=message: found(running, role, message), message)
        number = {"job_id": job_id} if role == "resets" else {"seq": seq}
        assert line.items() >= {"security_id": "LOGGED", **number}.items()
    published = [line for line in lines(running, "triggers") if line.get("job_id") == job_id]
    assert [line["message"] for line in published] == [f"job {job_id} published", f"job {job_id} released"]
    assert {line["security_id"] for line in published} == {"LOGGED"}
    assert all(isinstance(line["event_id"], int) for line in published)
    for topic in ("reprocessing-triggers", "reprocessing-status"):
        for record in [record for record in await running.read(topic) if record.key == b"LOGGED"]:
            headers = dict(record.headers)
            assert headers["security_id"] == b"LOGGED"
            assert headers["seq" if topic.endswith("triggers") else "job_id"].isdigit()
    records = [record for record in await running.read("reprocessing-jobs") if record.key == b"LOGGED"]
    for record in records:
        headers = dict(record.headers)
        assert headers["security_id"] == b"LOGGED"
        assert headers["job_id"].isdigit()
        assert headers["event_id"].isdigit()
    assert headers["job_id"] == str(job_id).encode()
