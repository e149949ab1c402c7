"""Settings: environment variables with prefix TIDEMARK_ and a .env file, checked at start (contract, Settings)."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from sinks.corrections import Debounce
from sinks.ranges import RESET_RATE, Real
from sinks.session import ANSWER_SECONDS, Address

ROLES = ("intake", "triggers", "resets", "books")
STACK_FILE = "stack.json"
_SHOWN = 80  # characters of a wrong value in a message
# What may hold a password: a message names the setting, and not what was given.
_NEVER_SHOWN = frozenset({"broker_url", "database_url", "web_token", "sasl_password", "sasl_oauth_token_url"})


class SettingsError(Exception):
    """A setting is wrong or missing; the message is one line that names it and says what to do."""


def _within(numbers: Real) -> Any:
    return Field(ge=numbers.low, le=numbers.high, allow_inf_nan=False)


_Milliseconds = Annotated[float, _within(Real(1, 3_600_000))]
_Seconds = Annotated[float, _within(Real(0.1, 86_400))]
_SecondsOrNone = Annotated[float, _within(Real(0, 86_400))]
_Days = Annotated[float, _within(Real(0, 36_500))]
_PORT = range(1, 65_536)


class Settings(BaseSettings):
    """What an operator may set. Units are in the names; defaults suit one machine."""

    model_config = SettingsConfigDict(
        env_prefix="TIDEMARK_", env_file=".env", extra="ignore", frozen=True, env_ignore_empty=True
    )

    broker_url: str | None = Field(None, description="kafka://host:port;host:port… ; none: the local stack's")
    database_url: SecretStr | None = Field(None, description="postgresql://… ; none: the local stack's")
    database_timeout_seconds: Annotated[float, Field(ge=1, le=3600)] = Field(
        ANSWER_SECONDS, description="a statement that Postgres does not answer, nor works on, is given up after so long"
    )
    data_dir: Path = Field(Path(".tidemark"), description="local stack, table state (RocksDB), logs")
    web_host: str = Field(
        "127.0.0.1", description="address every worker's web server binds", pattern=r"^[A-Za-z0-9._:-]{1,253}$"
    )
    web_port: Annotated[int, Field(ge=0, le=65535)] = Field(0, description="0: a free port")
    web_token: SecretStr | None = Field(None, description="web requests need it; unset: read-only")
    topic_prefix: str = Field(
        "", description="put before every topic and consumer group", pattern=r"^[A-Za-z0-9._-]{0,200}$"
    )
    internal_partitions: Annotated[int, Field(ge=1, le=1024)] = Field(
        4, description="partitions of every internal topic; fixed at first start"
    )
    input_partitions: Annotated[int, Field(ge=1, le=1024)] = Field(
        4, description="partitions of prices and transactions when they are created"
    )
    replication_factor: Annotated[int, Field(ge=1, le=15)] = Field(1, description="of created topics")
    cost_basis_method: Literal["FIFO", "AVCO"] = Field("FIFO", description="one method per installation")
    reset_rows_per_second: Annotated[float, _within(RESET_RATE)] = Field(
        10_000, description="first value of the cluster-wide limit on watermark resets"
    )
    reset_chunk_rows: Annotated[int, Field(ge=1, le=100_000)] = Field(
        10_000, description="the most keys a reset locks at once"
    )
    reset_chunk_target_ms: _Milliseconds = Field(
        100, description="chunks of resets are kept small enough to end within so long"
    )
    reset_adaptive: bool = Field(False, description="lower the reset rate while live transactions are slow")
    reset_latency_target_ms: _Milliseconds = Field(
        200, description="adaptive mode: a live transaction that runs longer is slow"
    )
    debounce_seconds: _SecondsOrNone = Field(
        0, description="late prices of a security settle so long before they make a job; 0: at once"
    )
    debounce_ceiling_seconds: _Seconds = Field(60, description="but no correction settles longer than this")
    valuation_keys: Annotated[int, Field(ge=1, le=100_000)] = Field(2_000, description="keys one valuation claims")
    batch_records: Annotated[int, Field(ge=1, le=100_000)] = Field(
        5_000, description="the most records in one sink transaction"
    )
    batch_target_ms: _Milliseconds = Field(
        2_000, description="sink transactions are kept small enough to end within so long"
    )
    poison_attempts: Annotated[int, Field(ge=2, le=100)] = Field(
        3, description="a record at which workers die or fail so often, while others pass, becomes a dead letter"
    )
    poison_verdicts_per_hour: Annotated[int, Field(ge=1, le=10_000)] = Field(
        10, description="the most records of a topic condemned as poison within an hour; then the worker stops"
    )
    trial_seconds: Annotated[float, Field(ge=1, le=3600)] = Field(
        60, description="a record in trial that takes longer has failed"
    )
    trial_memory_mb: Annotated[int, Field(ge=128, le=1_048_576)] = Field(
        512, description="the most memory of the process that reads a partition in trial"
    )
    replay_rows: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        10_000, description="replayed transactions one sink transaction queues itself; longer replays the relay expands"
    )
    session_timeout_seconds: Annotated[float, _within(Real(1, 300))] = Field(15, description="Kafka group session")
    group_instance_id: str | None = Field(
        None,
        description="a name of this worker alone that outlives it: its partitions are kept for it while it restarts",
        pattern=r"^[A-Za-z0-9._-]{1,200}$",
    )
    shutdown_seconds: _Seconds = Field(
        20, description="a worker that is told to stop abandons after so long what it still waits for"
    )
    standstill_seconds: Annotated[float, Field(ge=10, le=86_400)] = Field(
        180, description="/healthz says 503 when a loop of the worker has stood still for so long"
    )
    repair_after_seconds: _Seconds = Field(
        30, description="a correction without a live job for so long is issued again"
    )
    audit_share: Annotated[float, _within(Real(0, 1))] = Field(
        0.02, description="of one processor's time, for the auditor in the background; 0: none"
    )
    retain_superseded_history_days: _Days = Field(
        0, description="superseded history is removed after so long; 0: never"
    )
    retain_finished_jobs_days: _Days = Field(
        30, description="finished jobs whose corrections are right are removed after so long; 0: never"
    )
    log_format: Literal["text", "json"] = Field("text", description="of the workers' logs; json: an object per line")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how the broker is spoken to"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = Field(
        "PLAIN", description="how this worker says who it is"
    )
    sasl_username: str | None = Field(None, description="the user; for OAUTHBEARER the client's id")
    sasl_password: SecretStr | None = Field(None, description="its password; for OAUTHBEARER the client's secret")
    sasl_oauth_token_url: str | None = Field(None, description="https://… that gives a token for client id and secret")
    sasl_oauth_scope: str | None = Field(None, description="asked of it, if it wants to be told one")
    ssl_cafile: Path | None = Field(None, description="PEM file with the authorities that may vouch for the broker")
    ssl_certfile: Path | None = Field(None, description="PEM file with this worker's certificate, for mutual TLS")
    ssl_keyfile: Path | None = Field(None, description="PEM file with the certificate's key")

    @field_validator("web_token", "sasl_password", "database_url")
    @classmethod
    def _one_line(cls, value: SecretStr | None) -> SecretStr | None:
        """A line break in a secret would end a header early, and clients would print the secret to say so."""
        secret = value.get_secret_value() if value else ""
        if secret != secret.strip() or any(not (each.isprintable() or each == " ") for each in secret):
            raise ValueError("has a blank at an end, or a character that is not printable (a line break?)")
        return value

    @field_validator("broker_url")
    @classmethod
    def _kafka_scheme(cls, value: str | None) -> str | None:
        if value is None:
            return None
        for part in value.split(";"):
            host, _, port = part.removeprefix("kafka://").rpartition(":")
            if not host or not _is_port(port) or set(host) & set("/@ ") or not host.isprintable():
                raise ValueError("expected kafka://host:port;host:port…")
        return value

    @field_validator("database_url")
    @classmethod
    def _postgres_scheme(cls, value: SecretStr | None) -> SecretStr | None:
        if value and not _is_postgres(value.get_secret_value()):
            raise ValueError(
                "expected postgresql://user:password@host:port/database, with / ? # @ of a password percent-encoded"
            )
        return value

    @field_validator("ssl_cafile", "ssl_certfile", "ssl_keyfile")
    @classmethod
    def _readable(cls, value: Path | None) -> Path | None:
        if value is not None:
            try:
                value.open().close()
            except OSError as error:
                raise ValueError(f"cannot be read: {error.strerror}") from None
        return value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.security_protocol.startswith("SASL"):
            return self
        needed = ["sasl_username", "sasl_password"]
        if self.sasl_mechanism == "OAUTHBEARER":
            needed.append("sasl_oauth_token_url")
        if missing := [f"TIDEMARK_{name.upper()}" for name in needed if getattr(self, name) is None]:
            raise ValueError(
                f"TIDEMARK_SECURITY_PROTOCOL is {self.security_protocol} with {self.sasl_mechanism}: "
                f"set {', '.join(missing)} too"
            )
        return self

    @cached_property
    def bootstrap_servers(self) -> str:
        """host:port,host:port: the form Kafka clients take."""
        return ",".join(part.removeprefix("kafka://") for part in self.broker.split(";"))

    @property
    def broker(self) -> str:
        """The broker's address; SettingsError when neither named nor running locally."""
        if self.broker_url is None:
            raise SettingsError(self._nothing_named("TIDEMARK_BROKER_URL"))
        return self.broker_url

    @property
    def dsn(self) -> Address:
        """The database's address; SettingsError when neither named nor running locally."""
        if self.database_url is None:
            raise SettingsError(self._nothing_named("TIDEMARK_DATABASE_URL"))
        return Address(self.database_url.get_secret_value(), self.database_timeout_seconds)

    def _nothing_named(self, name: str) -> str:
        return f"no local stack runs in {self.data_dir}: start one with `tidemark up`, or set {name}"

    def check_web(self) -> None:
        """Raises SettingsError where the web servers would be open to the network without a token."""
        if self.web_token is None and self.web_host not in ("127.0.0.1", "localhost", "::1"):
            raise SettingsError(
                f"TIDEMARK_WEB_HOST is {self.web_host}: set TIDEMARK_WEB_TOKEN too, so that not everyone who reaches "
                "that address can look at the books and act on them"
            )

    def environment(self) -> dict[str, str]:
        """The environment variables that give another process the same settings."""
        values = {name: getattr(self, name) for name in self.model_fields_set if name in type(self).model_fields}
        return {
            f"TIDEMARK_{name.upper()}": value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            for name, value in values.items()
            if value is not None
        }

    @property
    def debounce(self) -> Debounce | None:
        """How late prices settle before they make a job; None: not at all."""
        if self.debounce_seconds == 0:
            return None
        return Debounce(self.debounce_seconds, self.debounce_ceiling_seconds)

    def topic(self, name: str) -> str:
        """The topic's name on the broker."""
        return self.topic_prefix + name

    def group(self, role: str) -> str:
        """The consumer group, and Faust app id, of a role."""
        return f"{self.topic_prefix}tidemark-{role}"


def load(**overrides: Any) -> Settings:
    """Read the settings; addresses that are not named come from the local stack in DATA_DIR, if one runs there.

    Raises SettingsError with one line per wrong setting.
    """
    settings = load_named(**overrides)
    if settings.broker_url and settings.database_url:
        return settings
    return settings.model_copy(update=_local_addresses(settings))


def load_named(**overrides: Any) -> Settings:
    """Read the settings alone: what is not named stays None. Raises SettingsError."""
    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(dict(e)) for e in error.errors())) from None


def _explain(error: dict[str, Any]) -> str:
    said = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # of several settings, which it names itself
        return str(said)
    setting = str(error["loc"][0])
    name = f"TIDEMARK_{setting.upper()}"
    if setting in _NEVER_SHOWN:
        return f"{name}: {said}"
    given = repr(error.get("input"))
    return f"{name}: {said} (got {given if len(given) <= _SHOWN else given[:_SHOWN] + '…'})"


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and int(text) in _PORT


def _is_postgres(url: str) -> bool:
    """Whether the driver can take the address apart; its own complaint would show the password."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    hosts = [host.rpartition("]")[2] for host in parts.netloc.rpartition("@")[2].split(",")]  # without [IPv6]
    ports = [host.rpartition(":")[2] for host in hosts if ":" in host]
    return parts.scheme in ("postgresql", "postgres") and all(map(_is_port, ports))


def _local_addresses(settings: Settings) -> dict[str, Any]:
    try:
        stack = json.loads((settings.data_dir / STACK_FILE).read_text())
    except (OSError, ValueError):
        return {}
    found: dict[str, Any] = {}
    if settings.broker_url is None and stack.get("broker_url"):
        found["broker_url"] = stack["broker_url"]
    if settings.database_url is None and stack.get("database_url"):
        found["database_url"] = SecretStr(stack["database_url"])
    return found
