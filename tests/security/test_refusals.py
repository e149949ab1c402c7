"""Who the broker is and who we are: each way to say it works, and each way to say it wrong is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streams import permissions
from streams.settings import SettingsError, load_named
from tests.refused import refused
from tests.security.conftest import SecureKafka
from tests.security.test_acls import prefix as prefix
from tests.security.test_acls import says
from tests.topology import until


def changed(secure: SecureKafka, how: str) -> dict[str, Any]:
    """Settings that are wrong in one way."""
    return {
        "a stranger's certificate": {"ssl_cafile": secure.folder / "stranger.pem"},
        "an expired certificate": {"broker_url": secure.expired},
        "a wrong password": {"sasl_password": "wrong"},
        "an unknown user": {"sasl_username": "nobody"},
        "a mechanism that the broker has not": {"sasl_mechanism": "PLAIN"},
        "no certificate of one's own": {"broker_url": secure.mutual, "security_protocol": "SSL"},
        "no TLS": {"security_protocol": "SASL_PLAINTEXT"},
        "a file that is no certificate": {"ssl_cafile": secure.folder / "kafka.log"},
    }[how]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a stranger's certificate", "its certificate is refused: unable to get local issuer certificate"),
        ("an expired certificate", "its certificate is refused: certificate has expired"),
        ("a wrong password", ": Authentication failed during authentication due to invalid credentials"),
        ("an unknown user", ": Authentication failed during authentication due to invalid credentials"),
        ("a mechanism that the broker has not", "it does not take PLAIN (TIDEMARK_SASL_MECHANISM)"),
        ("no certificate of one's own", "closed; does it want a certificate of ours (TIDEMARK_SSL_CERTFILE)"),
        ("no TLS", "closed; does it want another TIDEMARK_SECURITY_PROTOCOL?"),
        ("a file that is no certificate", "kafka.log holds no certificate in PEM form"),
    ],
)
async def test_a_worker_that_may_not_in_says_why_in_one_line(
    secure: SecureKafka, how: str, said: str, tmp_path: Path
) -> None:
    assert said in await refused(secure.settings("resets", **changed(secure, how)), "resets", tmp_path)


async def test_a_worker_that_lacks_a_permission_names_it(secure: SecureKafka, prefix: str, tmp_path: Path) -> None:
    settings = secure.settings("resets", topic_prefix=prefix)
    needed = permissions.needed(settings, "resets")
    secure.grant("tidemark-resets", [each for each in needed if each.name != settings.topic("prices")])
    line = await refused(settings, "resets", tmp_path)
    assert f"Kafka user tidemark-resets may not Read topic {prefix}prices: " in line


async def test_every_way_to_say_who_one_is(secure: SecureKafka, prefix: str, token_url: str) -> None:
    ways: dict[str, dict[str, Any]] = {
        "SCRAM-SHA-256": {"sasl_mechanism": "SCRAM-SHA-256"},
        "SCRAM-SHA-512": {},
        "OAUTHBEARER": {"sasl_mechanism": "OAUTHBEARER", "sasl_oauth_token_url": token_url},
        "mutual TLS": {
            "broker_url": secure.mutual,
            "security_protocol": "SSL",
            "ssl_certfile": secure.folder / "worker.pem",
        },
    }
    first = secure.settings("resets", topic_prefix=prefix)
    secure.grant("tidemark-resets", permissions.needed(first, "resets"))
    for way, changes in ways.items():
        settings = secure.settings("resets", topic_prefix=prefix, **changes)
        await until(says(settings, "resets", None), way)


async def test_a_client_secret_that_is_wrong_is_told(secure: SecureKafka, token_url: str, tmp_path: Path) -> None:
    changes = {"sasl_mechanism": "OAUTHBEARER", "sasl_oauth_token_url": token_url, "sasl_password": "wrong"}
    line = await refused(secure.settings("resets", **changes), "resets", tmp_path)
    assert f"{token_url} gives no token: 401 Unauthorized" in line


def test_settings_that_do_not_fit_together_are_told() -> None:
    with pytest.raises(
        SettingsError, match=r"^TIDEMARK_SECURITY_PROTOCOL is SASL_SSL with OAUTHBEARER: set TIDEMARK_S"
    ):
        load_named(security_protocol="SASL_SSL", sasl_mechanism="OAUTHBEARER", sasl_username="u")
    with pytest.raises(SettingsError, match=r"^TIDEMARK_SSL_CAFILE: cannot be read: No such file"):
        load_named(ssl_cafile="/nowhere.pem")
