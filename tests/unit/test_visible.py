"""Text of others on the console, on the command line and in logs: nothing in it passes for something else."""

from __future__ import annotations

import ast
import io
import json
import logging
import logging.config
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.table import Table

from streams import logs
from streams.visible import visible, visible_json
from streams.web.links import from_segment, local_path, segment
from streams.web.render import block, environment
from tidemark.commands import output

COMMANDS = Path(output.__file__).parent
HOSTILE = [
    "X[/b]",
    "Y[link=file:///etc/passwd]z[/link]",
    "[red]",
    ":smile:",
    "\u202eabc",
    "a\u200bb",
    "\x1b[31m",
    "a\nb",
]


def test_what_cannot_be_seen_is_shown_as_an_escape() -> None:
    assert visible("\u202ea\u200bb\x1b[1m\n\u2028\U000e0041\udcff") == (
        "\\u202ea\\u200bb\\x1b[1m\\x0a\\u2028\\U000e0041\\udcff"
    )
    assert visible("Société 日経225 💰 {x} [b] %2F") == "Société 日経225 💰 {x} [b] %2F"


@given(st.text())
def test_whatever_the_text_it_is_one_line_that_can_be_printed(text: str) -> None:
    assert len(visible(text).splitlines()) <= 1
    visible(text).encode()


@given(st.recursive(st.text() | st.integers(), lambda inner: st.dictionaries(st.text(), inner)))
@example("\u202e\U000e0041\x9b")
def test_a_document_for_machines_means_the_same(value: object) -> None:
    document = visible_json(json.dumps(value, ensure_ascii=False))
    assert json.loads(document) == value
    assert visible(document) == document


@pytest.mark.parametrize("text", HOSTILE)
def test_tables_of_commands_have_no_markup(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("id", box=None)
    output.add_row(table, [text])
    output.console(width=100).print(table)
    output.console(width=100).print(text.replace("\n", ""))
    output.echo(text)
    printed = capsys.readouterr().out
    assert visible(text) in printed.splitlines()[1]
    assert printed.splitlines()[-1] == visible(text)


def test_commands_print_in_one_way() -> None:
    for path in [*COMMANDS.glob("*.py"), COMMANDS.parent / "main.py"]:
        if path.name == "output.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert name not in ("click.echo", "Console", "print", "click.secho"), f"{path.name}:{node.lineno}"
            assert not name.endswith(".add_row") or name == "output.add_row", f"{path.name}:{node.lineno}"


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
@example("..")
@example("~..")
@example("~~.")
@example("%2F/{}")
def test_a_segment_names_its_identifier_and_no_other(text: str) -> None:
    from urllib.parse import unquote

    path = segment(text)
    assert "/" not in path
    assert path not in (".", "..")
    assert from_segment(unquote(path)) == text


@pytest.mark.parametrize(
    "target",
    [
        "//h",
        "/\t/h",
        "/\n/h",
        "/\\h",
        "\\\\h",
        "https://h",
        "h",
        "",
        "/\u2028/h",
        "/x\r\nSet-Cookie: a=b",
        "/\x00",
        "\t//h",
    ],
)
def test_a_target_elsewhere_is_the_start_page(target: str) -> None:
    assert local_path(target) == "/"


@pytest.mark.parametrize("target", ["/", "/corrections?a=b#c", "/portfolios/P%2F1/securities/%7B%7D", "/%09/h"])
def test_a_target_here_stays_as_it_is(target: str) -> None:
    assert local_path(target) == target


def test_templates_show_escapes_and_fields_keep_the_text() -> None:
    template = environment().from_string('<p>{{ x }}</p><input value="{{ x|exact }}"><pre>{{ y|block }}</pre>')
    assert template.render(x="\u202e<b>", y="a\n\t\u200b<") == (
        '<p>\\u202e&lt;b&gt;</p><input value="\u202e&lt;b&gt;"><pre>a\n\t\\u200b&lt;</pre>'
    )
    assert block("a\nb") == "a\nb"


def test_no_text_of_others_makes_a_line_in_the_logs() -> None:
    before = logging.root.handlers[:], logging.root.level
    try:
        for form in ("text", "json"):
            config = logs.text_configuration() if form == "text" else logs.configuration()
            stream = io.StringIO()
            if form == "text":
                from mode.utils.logging import setup_logging

                setup_logging(loglevel=logging.INFO, logfile=stream, logging_config=config)
                logging.root.handlers[0].setStream(stream)  # type: ignore[attr-defined]
            else:
                logging.config.dictConfig(config)
                logging.root.handlers[0].setStream(stream)  # type: ignore[attr-defined]
            logger = logging.getLogger("tests.forged")
            logger.info("at %s", "x\n[2026-01-01 00:00:00,000] FORGED \u202e \x1b[2J \r[x] FORGED \udcff")
            try:
                raise ValueError("y\n[2026-01-01 00:00:00,000] FORGED")
            except ValueError:
                logger.exception("failed")
            written = stream.getvalue()
            assert written.count("FORGED") == 4  # the trace shows the source too
            assert not [line for line in written.splitlines() if line.startswith(("[2026-01-01", "[x]"))], form
            assert not {"\u202e", "\x1b", "\r", "\udcff"} & set(written)
    finally:
        logging.root.handlers[:], level = before
        logging.root.setLevel(level)
