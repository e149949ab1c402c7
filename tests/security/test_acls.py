"""Each role with exactly the permissions that `tidemark acls` prints: it works; with one less it says which."""

from __future__ import annotations

import json
import uuid
from collections.abc import Awaitable, Callable

import pytest
from click.testing import CliRunner

from streams import permissions, preflight, topics
from streams.permissions import Permission
from streams.settings import ROLES, Settings
from streams.topics import TopicError, ensure_topics
from tests.security.conftest import SecureKafka
from tests.topology import until
from tidemark.main import main


@pytest.fixture
async def prefix(secure: SecureKafka) -> str:
    """Of topics that somebody has made who may do nothing else."""
    found = f"t{uuid.uuid4().hex[:8]}-"
    settings = secure.settings("topics", topic_prefix=found)
    secure.grant("tidemark-topics", permissions.needed_to_create(settings))

    async def made() -> bool:
        try:
            return bool(await ensure_topics(settings))
        except TopicError:
            return False

    await until(made, "topics")
    return found


async def refusal(settings: Settings, role: str) -> str | None:
    """What the check before the start says, None when the role may start."""
    try:
        await preflight.check(settings, role)
    except TopicError as error:
        return str(error)
    return None


def says(settings: Settings, role: str, wanted: str | None) -> Callable[[], Awaitable[bool]]:
    """Whether the check says that; brokers learn of permissions a moment after they have been granted."""

    async def look() -> bool:
        return await refusal(settings, role) == wanted

    return look


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_is_refused_with_any_one_permission_less(secure: SecureKafka, prefix: str, role: str) -> None:
    settings = secure.settings(role, topic_prefix=prefix)
    user = f"tidemark-{role}"
    needed = permissions.needed(settings, role)
    nothing = await refusal(settings, role)
    assert nothing is not None
    assert all(spoken(each) in nothing for each in needed)
    secure.grant(user, needed)
    await until(says(settings, role, None), "leave to start")
    for each in needed:
        secure.revoke(user, [each])

        async def named(each: Permission = each) -> bool:
            line = await refusal(settings, role) or ""
            found = line.removeprefix(f"Kafka user {user} may not ").partition(": ")[0].split(", ")
            return spoken(each) in found and all(one.endswith(f" {each.name}") for one in found)

        await until(named, f"a refusal that names {each}")
        secure.grant(user, [each])
        await until(says(settings, role, None), "leave to start")


def spoken(permission: Permission) -> str:
    """As the refusal has it; where Describe is gone too, all of that topic is named."""
    return f"{permission.operation} {permission.resource} {permission.name}"


async def test_a_topic_that_is_not_there_is_named(secure: SecureKafka) -> None:
    settings = secure.settings("admin", sasl_username="admin", topic_prefix=f"t{uuid.uuid4().hex[:8]}-")
    found = await refusal(settings, "resets")
    assert found is not None
    assert found.startswith(f"no topic {settings.topic(topics.BUSINESS_DATES)}, ")
    assert found.endswith(": create what is missing with `tidemark topics`")


def test_the_command_prints_what_the_check_wants() -> None:
    lines = CliRunner().invoke(main, ["acls", "--principal", "User:CN={role}"]).output.splitlines()
    rows = json.loads(CliRunner().invoke(main, ["acls", "--json"]).output)
    assert "--add --allow-principal User:CN=triggers --operation Write --topic reprocessing-jobs" in lines
    assert len(lines) == len(rows)
    found = {Permission(r["resource"], r["name"], r["operation"]) for r in rows if r["role"] == "triggers"}
    assert Permission("topic", "tidemark-triggers-triggers-changelog", "Write") in found
