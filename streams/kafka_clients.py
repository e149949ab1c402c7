"""Connection settings of plain Kafka clients (producers, admin), from Tidemark's settings."""

from __future__ import annotations

import ssl
from typing import TypedDict

from streams.settings import Settings


class ClientSettings(TypedDict, total=False):
    """Keyword arguments that every aiokafka client takes."""

    bootstrap_servers: str
    security_protocol: str
    ssl_context: ssl.SSLContext | None
    sasl_mechanism: str
    sasl_plain_username: str | None
    sasl_plain_password: str | None


def client_settings(settings: Settings) -> ClientSettings:
    """How to reach the broker, and as whom."""
    found = ClientSettings(
        bootstrap_servers=settings.bootstrap_servers,
        security_protocol=settings.security_protocol,
        ssl_context=ssl_context(settings),
    )
    if settings.security_protocol.startswith("SASL"):
        found["sasl_mechanism"] = settings.sasl_mechanism
        found["sasl_plain_username"] = settings.sasl_username
        found["sasl_plain_password"] = settings.sasl_password.get_secret_value() if settings.sasl_password else None
    return found


def ssl_context(settings: Settings) -> ssl.SSLContext | None:
    """The TLS context for SSL and SASL_SSL, else None. Raises OSError when a named file cannot be read."""
    if not settings.security_protocol.endswith("SSL"):
        return None
    context = ssl.create_default_context(cafile=settings.ssl_cafile)
    if settings.ssl_certfile:
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    return context
