"""The command `hfmpi`, which imports a subcommand only when it is called."""

from __future__ import annotations

import importlib
import signal
import sys

import click

from hfmpi.errors import did_you_mean
from hfmpi.version import __version__

__all__ = ["cli", "entry"]

COMMANDS = {
    "prepare": "Make a corpus file from text.",
    "train": "Train a network, alone or under mpirun.",
    "evaluate": "Compute the validation loss of a run in bits per character.",
    "sample": "Generate text with a trained network.",
    "plot": "Plot the loss against P_I and P_D, as in the paper's Figure 1.",
    "report": "Write a page of runs for the browser, also while they are running.",
    "speedup": "Compare measured and predicted speedup, and explain the difference.",
    "bench": "Time products, gradients, the Allreduce and steps on this machine.",
    "info": "Show ranks, cores, threads, GPUs and the MPI library.",
}


class LazyGroup(click.Group):
    """A group that lists its commands without importing them, so that `--help` is fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order in which users need them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import and return a command."""
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"hfmpi.cli.{name}"), name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that `args` begin with; for an unknown name, suggest the most similar one."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            meant = did_you_mean(name, COMMANDS)
            raise click.UsageError(
                f"there is no command {name!r}{meant}; `hfmpi --help` lists the commands", ctx
            )
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

    Prepare a corpus, train on it (`mpirun -n 8 hfmpi train ptb.h5`), evaluate and plot the run.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def entry() -> None:
    """Run the command; a user error prints one sentence and exits with code 2, on any number of ranks."""
    from hfmpi.cli.stand_in import stand_in
    from hfmpi.streams import protect

    if sys.argv[1:2] == ["train"]:
        stand_in()  # before the following imports start threads, as numpy does
    protect()

    has_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if has_default:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # so that Ctrl-C during imports prints no traceback
    from hfmpi.errors import UserError
    from hfmpi.parallel.failure import guard

    if has_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with guard():
        try:
            code = cli(prog_name="hfmpi", standalone_mode=False)  # also for `python -m hfmpi`
        except click.ClickException as error:
            raise UserError(error.format_message()) from None
        except click.Abort:
            code = 130
        if isinstance(code, int) and code:
            raise SystemExit(code)
