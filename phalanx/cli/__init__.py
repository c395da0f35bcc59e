"""The `phalanx` command: a group whose subcommands are imported when they are called, so that help is immediate."""

from __future__ import annotations

import importlib
from types import MappingProxyType

import click

from phalanx import __version__
from phalanx.errors import PhalanxError

COMMANDS = MappingProxyType(
    {
        "serve": ("phalanx.cli.serve", "Serve a model over an OpenAI-compatible API."),
        "status": ("phalanx.cli.status", "Show a service's ranks and its last recovery."),
        "chaos": ("phalanx.cli.chaos", "Make a rank of a service fail on purpose."),
        "bench": ("phalanx.cli.bench", "Measure a service: speed, and what its clients feel of a failure."),
        "plan": ("phalanx.cli.plan", "Place experts on ranks and see what their deaths would cost."),
        "make-model": ("phalanx.cli.make_model", "Write a small model: random, or one that talks."),
    }
)
"""Name -> (module, one line of help). The command is the module's attribute of that name, with _ for -."""


class _LazyGroup(click.Group):
    """Imports a subcommand's module when it is needed, and turns what the world does into one line and exit 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command), command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except PhalanxError as error:
            click.echo(f"phalanx {ctx.invoked_subcommand}: {error}", err=True)
            ctx.exit(2)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="phalanx")
def main() -> None:
    """Phalanx serves mixture-of-experts models on expert-parallel ranks, and goes on when ranks die."""
