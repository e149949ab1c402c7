"""The reference pages, written from the code when the site is built: nothing that can go stale is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import SecretStr

from sinks.database import migrations
from streams import permissions, topics
from streams.settings import ROLES, Settings
from tidemark.main import main


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by MkDocs: add the pages."""
    for name, lines in {
        "commands": commands(),
        "settings": settings(),
        "topics": topic_pages(),
        "tables": tables(),
        "api": api(),
    }.items():
        files.append(File.generated(config, f"reference/{name}.md", content="\n".join(lines) + "\n"))
    return files


def commands() -> Iterator[str]:
    """Every command with its help."""
    yield from ("# Commands", "", "What `tidemark COMMAND --help` prints.", "")
    yield from _commands(main, click.Context(main, info_name="tidemark"))


def _commands(group: click.Group, context: click.Context) -> Iterator[str]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context)
        if isinstance(command, click.Group):
            yield from _commands(command, inner)
        else:
            yield from (f"## {inner.command_path}", "", "```text", command.get_help(inner), "```", "")


def settings() -> Iterator[str]:
    """Every setting with its default."""
    yield from (
        "# Settings",
        "",
        "Environment variables, or lines of a file `.env`. `tidemark settings` prints them as set.",
        "",
    )
    yield from ("| setting | default | meaning |", "|---|---|---|")
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None or isinstance(field.default, SecretStr) else f"`{field.default}`"
        yield f"| `TIDEMARK_{name.upper()}` | {default if default != '``' else ''} | {_cell(field.description or '')} |"


def topic_pages() -> Iterator[str]:
    """Every topic: how it is created, who reads and who writes it."""
    defaults = Settings(_env_file=None)
    yield from (
        "# Topics",
        "",
        "As `tidemark topics` creates them. Records: see the contract of each in the tables below.",
        "",
    )
    yield from ("| topic | partitions | settings | read by | written by |", "|---|---|---|---|---|")
    for topic in topics.all_topics(defaults):
        config = ", ".join(f"`{name}={value}`" for name, value in topic.config.items())
        users = {
            operation: ", ".join(
                role
                for role in ROLES
                if permissions.Permission("topic", topic.name, operation) in permissions.needed(defaults, role)
            )
            for operation in ("Read", "Write")
        }
        fixed = " (fixed)" if topic.fixed_partitions else ""
        yield f"| `{topic.name}` | {topic.partitions}{fixed} | {config} | {users['Read']} | {users['Write']} |"
    yield from ("", "Every worker reads what any role reads, because any may be the one that reports the lag.", "")


def tables() -> Iterator[str]:
    """The schema, migration by migration."""
    yield from (
        "# Tables",
        "",
        "The schema `tidemark`, as `tidemark migrate` makes it. The columns say what they mean.",
        "",
    )
    for version, name, sql in migrations():
        yield from (f"## {version:04d} {name}", "", "```sql", sql.strip(), "```", "")


def api() -> Iterator[str]:
    """Every endpoint of the OpenAPI document."""
    text = resources.files("streams.web").joinpath("openapi.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    yield from ("# Web API", "", "Every `triggers` worker serves it; the whole document is at `/api/openapi.json`.", "")
    yield from ("| request | what it does |", "|---|---|")
    for path, methods in document["paths"].items():
        for method, described in methods.items():
            if method in ("get", "post", "put", "delete"):
                meaning = described.get("summary") or described.get("description", "")
                yield f"| `{method.upper()} {path}` | {_cell(meaning)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":  # a look at one page: python docs/hooks/reference.py settings
    import sys

    print("\n".join(globals()[Path(sys.argv[1]).name]()))
