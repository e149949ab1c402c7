"""`tidemark up`, `down`: the local stack, or the workers alone where broker and database are named."""

from __future__ import annotations

import asyncio
import signal

import click

from deploy.local import detached, state
from deploy.local.stack import Stack
from streams.settings import Settings, load_named
from tidemark.commands import output


@click.command()
@click.option("--detach", is_flag=True, help="Return when everything is ready; `tidemark down` stops it.")
def up(detach: bool) -> None:
    """Start Kafka, Postgres and all workers here; stop cleanly on Ctrl-C.

    With TIDEMARK_BROKER_URL and TIDEMARK_DATABASE_URL set, start the workers only.
    """
    settings = load_named()
    settings.check_web()
    if detach:
        _detach(settings)
    else:
        asyncio.run(_run(settings))


@click.command()
def down() -> None:
    """Stop the local stack; its data stays."""
    folder = load_named().data_dir
    output.echo("stopped" if detached.stop(folder) else f"no local stack runs in {folder}")


COMMANDS = [up, down]


async def _run(settings: Settings) -> None:
    console = output.console(stderr=True)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    with console.status("Starting") as progress:

        def report(step: str) -> None:
            progress.update(output.text(f"Starting: {step}"))
            if not console.is_terminal:
                console.print(f"starting: {step}")

        stack = Stack(settings, report)
        starting = asyncio.create_task(stack.start())

        def interrupt() -> None:
            if not stopping.is_set():  # a second signal must not cancel the clean-up
                stopping.set()
                starting.cancel()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, interrupt)
        try:
            await starting
        except asyncio.CancelledError:
            return
    found = state.read(settings.data_dir)
    if found:
        print_addresses(found)
    output.echo("Ctrl-C stops it.")
    await stopping.wait()
    with console.status("Stopping"):
        await stack.stop()


def _detach(settings: Settings) -> None:
    with output.console(stderr=True).status("Starting") as progress:
        found = detached.start(settings.data_dir, {}, lambda step: progress.update(output.text(step)))
    print_addresses(found)


def print_addresses(found: state.StackState) -> None:
    """Where the parts of a local stack are."""
    for name, url in (("broker", found.broker_url), ("database", found.database_url), ("web", found.web_url)):
        output.echo(f"{name:<10}{url}")
