"""The `hfmpi` command: its commands are imported only when one is called."""

from __future__ import annotations

import difflib
import importlib
import signal
import sys

import click

from hfmpi.version import __version__

__all__ = ["cli", "entry"]

COMMANDS = {
    "prepare": "Make a corpus file from text.",
    "train": "Train a network, alone or under mpirun.",
    "evaluate": "Validation loss of a run, bits per character.",
    "sample": "Let a trained network write.",
    "plot": "Loss against P_I and P_D, as in the paper's Figure 1.",
    "report": "A page of runs for the browser, also while they go on.",
    "speedup": "What more ranks brought, what was predicted, and where the rest went.",
    "bench": "Time products, gradients, the Allreduce and steps on this machine.",
    "info": "Ranks, cores, threads, GPUs and the MPI library.",
}


class LazyGroup(click.Group):
    """Commands by name; listing them imports none, so that `--help` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Give the names in the order in which people need them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import a command."""
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"hfmpi.cli.{name}"), name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that `args` begin with; a mistyped one is answered with the nearest."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name.lower(), COMMANDS, n=1)
            way_out = f"did you mean {near[0]}?" if near else "`hfmpi --help` lists those there are"
            raise click.UsageError(f"there is no command {name!r}; {way_out}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="hfmpi")
@click.pass_context
def cli(context: click.Context) -> None:
    """Hessian-free training of recurrent networks, data-parallel under MPI.

    Prepare a corpus, train on it (`mpirun -n 8 hfmpi train ptb.h5`), look at the run.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def entry() -> None:
    """Run the command; a user's mistake is one sentence and exit code 2, on however many ranks."""
    from hfmpi.cli.stand_in import stand_in
    from hfmpi.cli.streams import protect

    if sys.argv[1:2] == ["train"]:
        stand_in()  # before numpy starts threads, as what follows does
    protect()

    pythons = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if pythons:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is no traceback out of what is imported now
    from hfmpi.errors import UserError
    from hfmpi.parallel.failure import guard

    if pythons:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with guard():
        try:
            code = cli(prog_name="hfmpi", standalone_mode=False)  # by `python -m hfmpi` too
        except click.ClickException as error:
            raise UserError(error.format_message()) from None
        except click.Abort:
            code = 130
        if isinstance(code, int) and code:
            raise SystemExit(code)
