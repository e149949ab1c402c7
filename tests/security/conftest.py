"""A broker that lets nobody in without a name: TLS, SCRAM, OAUTHBEARER, mutual TLS, and an authorizer."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import pytest
import trustme
from aiohttp import web
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)
from cryptography.hazmat.primitives import serialization

from deploy.local.kafka import KafkaServer
from deploy.local.ports import LOOPBACK, Ports
from streams.kafka_clients import client_settings
from streams.permissions import Permission
from streams.settings import ROLES, Settings, load_named
from tests.servers import serving

PASSWORD = "correct horse"
_NAMES = ["admin", "topics", *ROLES]

_SERVER = """\
listeners=BROKER://{host}:{broker},MUTUAL://{host}:{mutual},EXPIRED://{host}:{expired},CONTROLLER://{host}:{controller}
advertised.listeners=BROKER://{host}:{broker},MUTUAL://{host}:{mutual},EXPIRED://{host}:{expired}
listener.security.protocol.map=BROKER:SASL_SSL,MUTUAL:SSL,EXPIRED:SASL_SSL,CONTROLLER:PLAINTEXT
sasl.enabled.mechanisms=SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER
sasl.mechanism.inter.broker.protocol=SCRAM-SHA-512
listener.name.broker.scram-sha-256.sasl.jaas.config={scram}
listener.name.broker.scram-sha-512.sasl.jaas.config={scram}
listener.name.expired.scram-sha-512.sasl.jaas.config={scram}
listener.name.expired.sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.broker.oauthbearer.sasl.jaas.config={oauth}
ssl.keystore.type=PEM
ssl.keystore.location={folder}/broker.pem
ssl.truststore.type=PEM
ssl.truststore.location={folder}/authority.pem
listener.name.mutual.ssl.client.auth=required
listener.name.expired.ssl.keystore.type=PEM
listener.name.expired.ssl.keystore.location={folder}/expired.pem
ssl.principal.mapping.rules=RULE:^CN=([^,]+).*$/$1/,DEFAULT
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:admin;User:ANONYMOUS
"""
_SCRAM = f'org.apache.kafka.common.security.scram.ScramLoginModule required username="admin" password="{PASSWORD}";'
# Takes tokens that nobody has signed, as Kafka does where nothing else is configured: for tests alone.
_OAUTH = (
    "org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required "
    'unsecuredLoginStringClaim_sub="admin";'
)


@dataclass(frozen=True)
class SecureKafka:
    """The broker and what a client needs to reach it."""

    folder: Path
    log: Path
    broker: str
    mutual: str
    expired: str
    admin: AdminClient

    def settings(self, name: str, **changes: Any) -> Settings:
        """As whom, over TLS with SCRAM unless changed."""
        return load_named(
            **{
                "broker_url": self.broker,
                "database_url": "postgresql://nowhere/none",
                "security_protocol": "SASL_SSL",
                "sasl_mechanism": "SCRAM-SHA-512",
                "sasl_username": f"tidemark-{name}",
                "sasl_password": PASSWORD,
                "ssl_cafile": self.folder / "authority.pem",
                "internal_partitions": 2,
                "input_partitions": 2,
                "session_timeout_seconds": 6,
                **changes,
            }
        )

    def grant(self, user: str, permissions: Iterable[Permission]) -> None:
        """Let the user do these."""
        for done in self.admin.create_acls([_binding(AclBinding, user, each) for each in permissions]).values():
            done.result(10)

    def revoke(self, user: str, permissions: Iterable[Permission]) -> None:
        """Take these away."""
        for done in self.admin.delete_acls([_binding(AclBindingFilter, user, each) for each in permissions]).values():
            assert len(done.result(10)) == 1

    def denials(self) -> list[str]:
        """What the authorizer has refused so far."""
        return [line for line in self.log.read_text().splitlines() if " is Denied " in line]


def _binding(kind: Any, user: str, permission: Permission) -> Any:
    return kind(
        ResourceType[permission.resource.upper()],
        permission.name,
        ResourcePatternType.LITERAL,
        f"User:{user}",
        "*",
        AclOperation[re.sub(r"(?<=[a-z])(?=[A-Z])", "_", permission.operation).upper()],
        AclPermissionType.ALLOW,
    )


@pytest.fixture(scope="session")
async def secure(folder: Path) -> AsyncIterator[SecureKafka]:
    """One for the run; topics are each test's own, by their prefix."""
    place = folder / "secure"
    place.mkdir()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(place / "authority.pem")
    trustme.CA().cert_pem.write_to_path(place / "stranger.pem")
    long_ago = datetime.now(UTC) - timedelta(days=1)
    _write(authority.issue_cert(LOOPBACK), place / "broker.pem")
    _write(authority.issue_cert(LOOPBACK, not_after=long_ago), place / "expired.pem")
    _write(authority.issue_cert("worker@tidemark.test", common_name="tidemark-resets"), place / "worker.pem")
    ports = Ports(folder / "ports.json")
    chosen = {name: ports.choose(f"secure-{name}") for name in ("mutual", "expired", "controller")}
    chosen["broker"] = ports.choose("secure")
    client = load_named(
        broker_url=f"kafka://{LOOPBACK}:{chosen['broker']}",
        security_protocol="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_username="admin",
        sasl_password=PASSWORD,
        ssl_cafile=place / "authority.pem",
    )
    options = {name: value for name, value in client_settings(client).items() if name != "bootstrap_servers"}
    server = KafkaServer(
        place / "kafka",
        place / "kafka.log",
        ports,
        "secure",
        _SERVER.format(host=LOOPBACK, folder=place, scram=_SCRAM, oauth=_OAUTH, **chosen),
        users=[
            f"{mechanism}=[name={name if name == 'admin' else f'tidemark-{name}'},password={PASSWORD}]"
            for name in _NAMES
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
        ],
        client=options,
    )
    async with serving("secure", server):
        admin = AdminClient(
            {
                "bootstrap.servers": client.bootstrap_servers,
                "security.protocol": "SASL_SSL",
                "sasl.mechanism": "SCRAM-SHA-512",
                "sasl.username": "admin",
                "sasl.password": PASSWORD,
                "ssl.ca.location": str(place / "authority.pem"),
            }
        )
        addresses = {name: f"kafka://{LOOPBACK}:{chosen[name]}" for name in ("broker", "mutual", "expired")}
        yield SecureKafka(place, place / "kafka.log", admin=admin, **addresses)


def _write(issued: trustme.LeafCert, file: Path) -> None:
    """Key and certificate in one file; Kafka reads keys as PKCS #8 only."""
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(text + b"".join(pem.bytes() for pem in issued.cert_chain_pems))


@pytest.fixture
async def token_url() -> AsyncIterator[str]:
    """An authorization server that gives whoever knows the password a token in his name."""

    async def answer(request: web.Request) -> web.Response:
        given = request.headers.get("Authorization", "").removeprefix("Basic ")
        name, _, password = map(unquote_plus, base64.b64decode(given).decode().partition(":"))
        if password != PASSWORD or (await request.post())["grant_type"] != "client_credentials":
            return web.json_response({"error": "invalid_client"}, status=401)
        now = int(time.time())
        parts = [{"alg": "none"}, {"sub": name, "iat": now, "exp": now + 3600}]
        encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
        return web.json_response({"access_token": ".".join([*encoded, ""]), "expires_in": 3600})

    app = web.Application()
    app.router.add_post("/token", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, LOOPBACK, 0)
    await site.start()
    assert site._server is not None
    yield f"http://{LOOPBACK}:{site._server.sockets[0].getsockname()[1]}/token"  # type: ignore[attr-defined]
    await runner.cleanup()
