"""Every command can be found by its name, and says what it is for."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pkgutil import iter_modules

from click.testing import CliRunner

from tidemark import commands
from tidemark.main import _MODULES, main


def test_every_command_of_every_module_is_listed_and_has_help() -> None:
    found = {
        command.name: module.name
        for module in iter_modules(commands.__path__)
        for command in getattr(import_module(f"tidemark.commands.{module.name}"), "COMMANDS", [])
    }
    assert found == _MODULES
    listed = CliRunner().invoke(main, ["--help"])
    assert listed.exit_code == 0
    for name in [*found, "migrate", "settings"]:
        assert f"\n  {name} " in listed.output
        shown = CliRunner().invoke(main, [name, "--help"])
        assert (shown.exit_code, shown.output.startswith(f"Usage: main {name}")) == (0, True)


def test_what_is_no_command_is_said_in_a_line() -> None:
    wrong = CliRunner().invoke(main, ["frobnicate"])
    assert (wrong.exit_code, "No such command 'frobnicate'" in wrong.output) == (2, True)


def test_a_worker_imports_no_other_command() -> None:
    asked = "main(['worker', '--help'], standalone_mode=False)"
    code = f"import sys; from tidemark.main import main; {asked}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name for name in done.stdout.split() if name.startswith("tidemark.")} == {
        "tidemark.main", "tidemark.commands", "tidemark.commands.output", "tidemark.commands.worker",
    }  # fmt: skip
