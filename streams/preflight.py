"""Before a worker starts: does the broker answer, does it know us, are the topics there, may we use them?

One connection asks what Kafka's clients would only find out one refusal at a time, each in a log line of its own.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from contextlib import closing
from typing import Any

from aiokafka import errors
from aiokafka.conn import AIOKafkaConnection, create_conn
from aiokafka.protocol.admin import DescribeGroupsResponse_v3
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.coordination import FindCoordinatorRequest
from aiokafka.protocol.types import Array, Boolean, Int16, Int32, Schema, String

from streams.kafka_clients import client_settings
from streams.permissions import Permission, needed
from streams.settings import Settings
from streams.topics import TopicError

_REQUEST_MS = 10_000
_CODES = {"Read": 3, "Write": 4, "Create": 5, "Describe": 8}  # org.apache.kafka.common.acl.AclOperation
_UTF8 = String("utf-8")


async def check(settings: Settings, role: str) -> None:
    """Raises TopicError, one line that says what is missing and what to do."""
    wanted = needed(settings, role)
    with closing(await _connect(settings)) as connection:
        try:
            allowed = await _topics(connection, sorted({name for resource, name, _ in wanted if resource == "topic"}))
            for group in sorted({name for resource, name, _ in wanted if resource == "group"}):
                allowed["group", group] = await _group(settings, connection, group)
        except (errors.KafkaError, OSError, TimeoutError) as error:
            raise TopicError(f"the broker at {settings.bootstrap_servers} does not answer: {_said(error)}") from error
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


async def _topics(connection: AIOKafkaConnection, names: list[str]) -> dict[tuple[str, str], int]:
    """The operations allowed on each topic, as bits. Raises TopicError for topics that do not exist."""
    found = await connection.send(_Metadata(names))
    allowed = {("topic", name): operations for _, name, _, _, operations in found.topics}
    unknown = errors.UnknownTopicOrPartitionError
    if missing := sorted(name for code, name, *_ in found.topics if errors.for_code(code) is unknown):
        raise TopicError(f"no topic {', '.join(missing)}: create what is missing with `tidemark topics`")
    return {
        key: 0 if operations < 0 else operations  # a topic that may not even be described
        for key, operations in allowed.items()
    }


async def _group(settings: Settings, connection: AIOKafkaConnection, group: str) -> int:
    """The operations allowed on a group, as bits; its coordinator knows."""
    where = await connection.send(FindCoordinatorRequest(group, 0))
    if where.error_code:
        if errors.for_code(where.error_code) is errors.GroupAuthorizationFailedError:
            return 0
        return ~0  # a fresh cluster is still making what answers this: the clients wait for it
    with closing(await _open(settings, f"{where.host}:{where.port}")) as coordinator:
        (described,) = (await coordinator.send(_DescribeGroups([group]))).groups
        return 0 if errors.for_code(described[0]) is errors.GroupAuthorizationFailedError else int(described[-1])


# -- requests that aiokafka does not have: those that ask for the operations allowed to the asker ----------------------


class _MetadataResponse(Response):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 8
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("brokers", Array(("node_id", Int32), ("host", _UTF8), ("port", Int32), ("rack", _UTF8))),
        ("cluster_id", _UTF8),
        ("controller_id", Int32),
        (
            "topics",
            Array(
                ("error_code", Int16),
                ("topic", _UTF8),
                ("is_internal", Boolean),
                (
                    "partitions",
                    Array(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", Array(Int32)),
                        ("isr", Array(Int32)),
                        ("offline_replicas", Array(Int32)),
                    ),
                ),
                ("authorized_operations", Int32),
            ),
        ),
        ("cluster_authorized_operations", Int32),
    )


class _MetadataRequest(RequestStruct):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 8
    RESPONSE_TYPE = _MetadataResponse
    SCHEMA = Schema(
        ("topics", Array(_UTF8)),
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
    )


class _Metadata(Request[_MetadataRequest]):  # type: ignore[misc]
    API_KEY = 3

    def __init__(self, topics: list[str]) -> None:
        self._topics = topics

    def build(self, request_struct_class: type[_MetadataRequest]) -> _MetadataRequest:
        return request_struct_class(self._topics, False, False, True)


class _DescribeGroupsRequest(RequestStruct):  # type: ignore[misc]
    API_KEY = 15
    API_VERSION = 3
    RESPONSE_TYPE = DescribeGroupsResponse_v3
    SCHEMA = Schema(("groups", Array(_UTF8)), ("include_authorized_operations", Boolean))


class _DescribeGroups(Request[_DescribeGroupsRequest]):  # type: ignore[misc]
    API_KEY = 15

    def __init__(self, groups: list[str]) -> None:
        self._groups = groups

    def build(self, request_struct_class: type[_DescribeGroupsRequest]) -> _DescribeGroupsRequest:
        return request_struct_class(self._groups, True)
