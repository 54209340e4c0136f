"""The command line, assembled from `commands/`."""

import os
from typing import Any

import click

from mlsae import __version__
from mlsae.base.errors import MlsaeError
from mlsae.base.interruption import InterruptedWorkError
from mlsae.base.output.console import escape_what_is_lacking
from mlsae.commands.analyze import analyze
from mlsae.commands.demo import demo
from mlsae.commands.events import events
from mlsae.commands.examples import examples
from mlsae.commands.export import export
from mlsae.commands.harvest import harvest
from mlsae.commands.import_ import import_
from mlsae.commands.latents import latents
from mlsae.commands.options import CommandList
from mlsae.commands.store import store
from mlsae.commands.train import train

_CAUSE_LETTERS = 100
"""Letters of another library's message that fit an error of one line."""


class _OneLineErrors(CommandList):
    """Commands, as a group that turns errors meant for the user into one line and exit status 1."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[:1] == ["activations"]:
            ctx.fail("No such command 'activations': its name is mlsae events.")
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **more: Any) -> Any:
        # Before anything is printed, the help too.
        escape_what_is_lacking()
        return super().main(*args, **more)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InterruptedWorkError as stop:
            # A stop that the user asked for is no error.
            click.echo(str(stop), err=True)
            ctx.exit(stop.exit_status)
        except MlsaeError as error:
            raise click.ClickException(" ".join(str(error).split())) from None
        except BrokenPipeError:
            # The reader of a list has what it wanted, as head does.
            raise
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            raise click.ClickException(f"{error.strerror or error}{where}") from None
        except (MemoryError, RuntimeError) as error:
            if not _is_full_memory(error):
                raise
            cause = " ".join(str(error).split())[:_CAUSE_LETTERS]
            raise click.ClickException(
                f"out of memory ({cause or 'of this machine'}): give a smaller --batch-size, or "
                f"free some memory"
            ) from None


def _is_full_memory(error: Exception) -> bool:
    # torch's error for a device is looked at by name, since torch is not loaded for every command;
    # for memory of the machine torch raises a plain RuntimeError.
    is_of_torch = type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
    return isinstance(error, MemoryError) or is_of_torch


@click.group(
    cls=_OneLineErrors,
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="mlsae")
def main() -> None:
    """Multi-layer sparse autoencoders: harvest once, train and analyze from the store."""
    # torch's threads wait for one another by spinning, for milliseconds. Where another program has
    # one of the cores that made training 20 times slower; a short spin costs 5% where none has.
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "5000"
    # Commands draw into files. A notebook names its own backend to every process it starts, and
    # matplotlib cannot be imported where that one is not installed.
    os.environ["MPLBACKEND"] = "agg"


for command in (
    harvest, train, analyze, events, latents, examples, export, import_, demo, store
):  # fmt: skip
    main.add_command(command)
