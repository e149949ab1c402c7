"""Every number that comes from outside has a finite range: settings, the API's document, and the commands."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from importlib import resources
from typing import Any

import click
import msgspec
import pytest
from annotated_types import Ge, Gt, Le, Lt
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from sinks.ranges import ID, PRIORITY, RESET_RATE, OutOfRange, Real, Whole
from streams.settings import Settings, SettingsError, load_named
from tidemark.commands.numbers import Number
from tidemark.main import main

DOCUMENT: dict[str, Any] = msgspec.json.decode(resources.files("streams.web").joinpath("openapi.json").read_bytes())
NUMBERS = [
    name
    for name, field in Settings.model_fields.items()
    if {int, float} & {field.annotation, *typing.get_args(field.annotation)}
]


def inputs() -> Iterator[tuple[str, Any]]:
    """(where, schema) of everything that a request may state."""
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            for parameter in operation.get("parameters", []):
                yield f"{method} {path} {parameter['name']}", parameter["schema"]
            for content in operation.get("requestBody", {}).get("content", {}).values():
                yield from within(f"{method} {path} body", content["schema"])


def within(where: str, schema: Any) -> Iterator[tuple[str, Any]]:
    """The schema and those inside it."""
    yield where, schema
    for name, inner in schema.get("properties", {}).items():
        yield from within(f"{where}.{name}", inner)


def parameters_of(command: click.Command, name: str = "") -> Iterator[tuple[str, click.Parameter]]:
    """Of the command and of all below it."""
    for each in command.params:
        yield f"{name} {each.name}", each
    if isinstance(command, click.Group):
        for sub in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), sub)
            assert found is not None
            yield from parameters_of(found, f"{name} {sub}")


def test_the_numbers_of_settings_are_found() -> None:
    assert len(NUMBERS) > 15
    assert {"reset_rows_per_second", "web_port", "audit_share"} <= set(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_of_the_settings_has_a_range(name: str) -> None:
    rules = Settings.model_fields[name].metadata
    low = [rule.ge if isinstance(rule, Ge) else rule.gt for rule in rules if isinstance(rule, Ge | Gt)]
    high = [rule.le if isinstance(rule, Le) else rule.lt for rule in rules if isinstance(rule, Le | Lt)]
    assert low, name
    assert high, name
    assert all(math.isfinite(float(each)) for each in low + high)
    for wrong in ("inf", "-inf", "nan", "1e400", "9" * 400, str(float(high[0]) * 2 + 1), "-1e9", "x", "²"):
        with pytest.raises(SettingsError, match=rf"^TIDEMARK_{name.upper()}: ") as refused:
            load_named(**{name: wrong})
        assert len(str(refused.value)) < 300
        assert "\n" not in str(refused.value)


def test_every_number_that_a_request_states_has_a_range() -> None:
    kinds = {where: schema for where, schema in inputs() if schema.get("type") in ("integer", "number")}
    assert len(kinds) > 15
    assert [where for where, schema in kinds.items() if not {"minimum", "maximum"} <= set(schema)] == []


def test_one_range_of_the_reset_rate_and_of_priorities() -> None:
    stated = dict(inputs())
    rate = stated["post /api/limit body.rows_per_second"]
    assert (rate["minimum"], rate["maximum"]) == (RESET_RATE.low, RESET_RATE.high)
    priority = stated["post /api/jobs/{job_id}/prioritise body.priority"]
    assert (priority["minimum"], priority["maximum"]) == (PRIORITY.low, PRIORITY.high)
    of_settings = Settings.model_fields["reset_rows_per_second"].metadata
    assert [rule.ge for rule in of_settings if isinstance(rule, Ge)] == [RESET_RATE.low]
    assert [rule.le for rule in of_settings if isinstance(rule, Le)] == [RESET_RATE.high]
    commands = {name: each.type for name, each in parameters_of(main)}
    for name, numbers in ((" throttle rows_per_second", RESET_RATE), (" jobs prioritise priority", PRIORITY)):
        assert isinstance(commands[name], Number)
        assert commands[name].numbers == numbers


def test_every_number_of_the_commands_has_a_range() -> None:
    found = [
        (name, kind)
        for name, each in parameters_of(main)
        for kind in (each.type.types if isinstance(each.type, click.Tuple) else [each.type])
    ]
    assert sum(isinstance(kind, Number) for _, kind in found) > 8
    for name, kind in found:
        assert kind not in (click.INT, click.FLOAT), name
        assert not isinstance(kind, click.FloatRange), f"{name}: takes nan"
        if isinstance(kind, click.IntRange):
            assert kind.min is not None, name
            assert kind.max is not None, name


@pytest.mark.parametrize("wrong", ["inf", "nan", "1e308", "1e-300", "1e400", "0", "0.5", "-3", "9" * 5000, "", "1_000"])
def test_a_number_outside_is_one_line_on_the_command_line(wrong: str) -> None:
    for command in (["throttle", "--", wrong], ["jobs", "show", "--", f"{wrong}x"], ["audit", "--sample", f"{wrong}n"]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2, result.output
        assert len(result.output.splitlines()) <= 4
        assert "expected a" in result.output


def test_bytes_that_are_no_text_and_odd_arguments_are_one_line() -> None:
    for command in (
        ["history", "P\udcff", "S"],
        ["acls", "--principal", "{x}{"],
        ["history", "P", "S", "--known-at", "0001-01-01T00:00:00+23:59"],
        ["pause", "--actor", "Ada\nForged"],
    ):
        result = CliRunner().invoke(main, command)
        assert result.exception is None or isinstance(result.exception, SystemExit), command
        assert len(result.output.splitlines()) <= 4 or command[0] == "acls"


@given(st.one_of(st.text(), st.floats().map(str), st.integers().map(str), st.decimals().map(str)))
@example("9" * 5000)
@example("٣")
@example("1\n")
def test_whatever_text_is_a_number_within_or_refused(text: str) -> None:
    for numbers in (ID, PRIORITY, RESET_RATE, Real(1e-6, 100), Whole(1, 1)):
        try:
            found = numbers.parse(text)
        except OutOfRange as error:
            said = str(error)
        else:
            said = ""
            assert numbers.low <= found <= numbers.high
            assert math.isfinite(found)
        assert "\n" not in said
        assert len(said) < 200


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())))
@example(10**400)
@example(2.5)
def test_whatever_value_is_a_number_within_or_refused(value: object) -> None:
    for numbers in (ID, PRIORITY, RESET_RATE):
        try:
            found = numbers.check(value)
        except OutOfRange as error:
            said = str(error)
        else:
            said = ""
            assert numbers.low <= found <= numbers.high
        assert len(said) < 200


SECRET = "s3cret-pw"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("web_token", f"{SECRET}\n"),
        ("web_token", f"{SECRET}\r\nX-Other: y"),
        ("web_token", f" {SECRET}"),
        ("web_token", f"{SECRET}\x00"),
        ("sasl_password", f"{SECRET}\n"),
        ("database_url", f"mysql://u:{SECRET}@h/db"),
        ("database_url", SECRET),
        ("database_url", f"postgresql://u:{SECRET}@h:port/db"),
        ("database_url", f"postgresql://u:{SECRET}/x@h/db"),
        ("database_url", f"postgresql://u:{SECRET}@h:99999/db"),
        ("database_url", f"postgresql://u:{SECRET}@[h/db"),
        ("broker_url", f"kafka://u:{SECRET}@h:9092"),
        ("broker_url", "kafka://h:99999999"),
    ],
)
def test_an_error_of_the_settings_shows_no_secret(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    if "\x00" not in value:
        monkeypatch.setenv(f"TIDEMARK_{name.upper()}", value)
        for command in (["worker", "triggers"], ["migrate"], ["settings"]):
            result = CliRunner().invoke(main, command)
            assert result.exit_code == 1
            assert result.output.startswith(f"Error: TIDEMARK_{name.upper()}: ")
            assert len(result.output.splitlines()) == 1
            assert SECRET not in result.output
    with pytest.raises(SettingsError) as refused:
        load_named(**{name: value})
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://u:{SECRET}@h1:5432,h2:5433/db?target_session_attrs=read-write",
        f"postgresql://u:{SECRET}@[::1]:5432/db",
        f"postgresql://u:{SECRET}@[::1]/db",
        "postgresql://postgres:@/postgres?host=/tmp/a",
        f"postgres://u:{SECRET}%40%2F@h/db",
    ],
)
def test_addresses_of_every_form_are_taken(url: str) -> None:
    assert load_named(database_url=url).dsn == url
