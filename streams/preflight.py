"""Before a worker starts: does the broker answer, does it know us, are the topics there, may we use them?

One connection asks what Kafka's clients would only find out one refusal at a time, each in a log line of its own.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import Any

from aiokafka import errors
from aiokafka.admin.config_resource import ConfigResourceType
from aiokafka.conn import AIOKafkaConnection, create_conn
from aiokafka.protocol.admin import DescribeConfigsRequest
from aiokafka.protocol.coordination import FindCoordinatorRequest

from streams import topics
from streams.kafka_clients import client_settings
from streams.permissions import Permission, needed, relied_on
from streams.protocol import DescribeGroups, Metadata
from streams.settings import Settings
from streams.topics import TopicError

_REQUEST_MS = 10_000
_CODES = {"Read": 3, "Write": 4, "Create": 5, "Describe": 8, "DescribeConfigs": 10}  # Kafka's AclOperation


async def check(settings: Settings, role: str) -> None:
    """Raises TopicError, one line that says what is missing or wrong and what to do."""
    wanted = needed(settings, role)
    names = sorted({name for resource, name, _ in wanted if resource == "topic"})
    groups = sorted({name for resource, name, _ in wanted if resource == "group"})
    with closing(await _connect(settings)) as connection:
        try:
            found = await _topics(connection, names)
            allowed = {("topic", name): operations for name, (_, operations) in found.items()}
            for group in groups:
                allowed["group", group] = await _group(settings, connection, group)
            _check_permissions(settings, wanted, allowed)
            policies = await _policies(connection, relied_on(settings, role))
        except (errors.KafkaError, OSError, TimeoutError) as error:
            raise TopicError(f"the broker at {settings.bootstrap_servers} does not answer: {_said(error)}") from error
    topics.check(settings, {name: partitions for name, (partitions, _) in found.items() if partitions}, policies)


def _check_permissions(
    settings: Settings, wanted: Iterable[Permission], allowed: Mapping[tuple[str, str], int]
) -> None:
    if missing := [each for each in wanted if not allowed[each.resource, each.name] >> _CODES[each.operation] & 1]:
        raise TopicError(f"{_who(settings)} may not {_listed(missing)}: `tidemark acls` prints what each role needs")


def _who(settings: Settings) -> str:
    return f"Kafka user {settings.sasl_username}" if settings.sasl_username else "this worker"


def _listed(missing: Iterable[Permission]) -> str:
    return ", ".join(f"{each.operation} {each.resource} {each.name}" for each in missing)


async def _connect(settings: Settings) -> AIOKafkaConnection:
    """To whichever broker answers first; its clients would log why one does not, and say nothing."""
    reasons = []
    for server in settings.bootstrap_servers.split(","):
        try:
            return await _open(settings, server)
        except ssl.SSLCertVerificationError as error:
            reasons.append(f"{server}: its certificate is refused: {error.verify_message}")
        except errors.UnsupportedSaslMechanismError:
            reasons.append(f"{server}: it does not take {settings.sasl_mechanism} (TIDEMARK_SASL_MECHANISM)")
        except errors.KafkaConnectionError as error:
            reasons.append(f"{server}: {_said(error)}; does it want {_other_protocols(settings)}?")
        except (errors.KafkaError, OSError, TimeoutError) as error:
            reasons.append(f"{server}: {_said(error)}")
    raise TopicError(f"cannot reach the broker at {'; '.join(reasons)}")


def _said(error: Exception) -> str:
    """Without the client's own decoration."""
    return str(error.args[0] if isinstance(error, errors.KafkaError) and error.args else error) or type(error).__name__


def _other_protocols(settings: Settings) -> str:
    """What a broker may want that hangs up on us."""
    if settings.security_protocol == "SSL":
        return "a certificate of ours (TIDEMARK_SSL_CERTFILE), or SASL_SSL (TIDEMARK_SECURITY_PROTOCOL)"
    return "another TIDEMARK_SECURITY_PROTOCOL"


async def _open(settings: Settings, server: str) -> AIOKafkaConnection:
    host, _, port = server.rpartition(":")
    options: dict[str, Any] = {**client_settings(settings)}
    del options["bootstrap_servers"]
    return await create_conn(host, int(port), client_id="tidemark", request_timeout_ms=_REQUEST_MS, **options)


async def _topics(connection: AIOKafkaConnection, names: list[str]) -> dict[str, tuple[int, int]]:
    """Of each topic, partitions and the operations allowed, as bits. Raises TopicError for topics that do not exist."""
    answer = await connection.send(Metadata(names))
    unknown = errors.UnknownTopicOrPartitionError
    if missing := sorted(name for code, name, *_ in answer.topics if errors.for_code(code) is unknown):
        raise TopicError(f"no topic {', '.join(missing)}: create what is missing with `tidemark topics`")
    return {
        name: (len(partitions), _operations(code, operations))
        for code, name, _, partitions, operations in answer.topics
    }


async def _policies(connection: AIOKafkaConnection, names: list[str]) -> dict[str, str]:
    """The cleanup policy of each topic."""
    asked = [(ConfigResourceType.TOPIC, name, [topics.CLEANUP]) for name in names]
    return topics.policies(await connection.send(DescribeConfigsRequest(asked))) if asked else {}


async def _group(settings: Settings, connection: AIOKafkaConnection, group: str) -> int:
    """The operations allowed on a group, as bits; its coordinator knows."""
    where = await connection.send(FindCoordinatorRequest(group, 0))
    if where.error_code:
        if errors.for_code(where.error_code) is errors.GroupAuthorizationFailedError:
            return 0
        return ~0  # a fresh cluster is still making what answers this: the clients wait for it
    with closing(await _open(settings, f"{where.host}:{where.port}")) as coordinator:
        ((code, *_, operations),) = (await coordinator.send(DescribeGroups([group]))).groups
        return _operations(code, operations)


def _operations(code: int, operations: int) -> int:
    """As bits. Whom the broker refuses the description may do nothing; other errors pass, and say nothing of rights."""
    error = errors.for_code(code)
    if error in (errors.GroupAuthorizationFailedError, errors.TopicAuthorizationFailedError):
        return 0
    return operations if error is errors.NoError else ~0
