"""Connection settings of Kafka clients, from Tidemark's settings; and how consumers read what they fetch."""

from __future__ import annotations

import ssl
from typing import TypedDict

from streams import fetched
from streams.oauth import TokenProvider
from streams.settings import Settings, SettingsError

fetched.install()  # here, since whoever connects to Kafka imports this module


class ClientSettings(TypedDict, total=False):
    """Keyword arguments that every aiokafka client takes."""

    bootstrap_servers: str
    security_protocol: str
    ssl_context: ssl.SSLContext | None
    sasl_mechanism: str
    sasl_plain_username: str | None
    sasl_plain_password: str | None
    sasl_oauth_token_provider: TokenProvider


def client_settings(settings: Settings) -> ClientSettings:
    """How to reach the broker, and as whom."""
    found = ClientSettings(
        bootstrap_servers=settings.bootstrap_servers,
        security_protocol=settings.security_protocol,
        ssl_context=ssl_context(settings),
    )
    if settings.security_protocol.startswith("SASL"):
        found["sasl_mechanism"] = settings.sasl_mechanism
        if settings.sasl_mechanism == "OAUTHBEARER":
            found["sasl_oauth_token_provider"] = token_provider(settings)
        else:
            found["sasl_plain_username"] = settings.sasl_username
            found["sasl_plain_password"] = password(settings)
    return found


def password(settings: Settings) -> str | None:
    """In clear, for the client alone."""
    return settings.sasl_password.get_secret_value() if settings.sasl_password else None


def token_provider(settings: Settings) -> TokenProvider:
    """For OAUTHBEARER."""
    assert settings.sasl_oauth_token_url is not None  # checked with the settings
    assert settings.sasl_username is not None
    return TokenProvider(
        settings.sasl_oauth_token_url,
        settings.sasl_username,
        password(settings) or "",
        settings.sasl_oauth_scope,
        settings.ssl_cafile,
    )


def ssl_context(settings: Settings) -> ssl.SSLContext | None:
    """The TLS context for SSL and SASL_SSL, else None. Raises SettingsError when a named file is no certificate."""
    if not settings.security_protocol.endswith("SSL"):
        return None
    try:
        context = ssl.create_default_context(cafile=settings.ssl_cafile)
    except ssl.SSLError:
        raise SettingsError(f"TIDEMARK_SSL_CAFILE: {settings.ssl_cafile} holds no certificate in PEM form") from None
    if settings.ssl_certfile:
        try:
            context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
        except ssl.SSLError as error:
            raise SettingsError(
                f"TIDEMARK_SSL_CERTFILE: {settings.ssl_certfile} with the key in "
                f"{settings.ssl_keyfile or settings.ssl_certfile} is no certificate in PEM form: {error.reason}"
            ) from None
    return context
