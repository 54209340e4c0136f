"""The command `mlsae train`."""

from pathlib import Path
from typing import Any

import click

from mlsae.base.errors import InputError
from mlsae.base.machine.heap import keep_freed_memory
from mlsae.commands.options import FILE, GroupedOption, SettingsCommand


def _use_run_file(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
    """Take a command's default options from a YAML file."""
    if path is None:
        return
    from mlsae.train.options import read_run_file

    names = {
        str(option.name): isinstance(option, click.Option) and option.multiple
        for option in ctx.command.get_params(ctx)
        if option.expose_value
    }
    try:
        ctx.default_map = read_run_file(path, names)
    except InputError as error:
        raise click.UsageError(str(error), ctx) from None


def _settings() -> type[Any]:
    from mlsae.train.config import TrainConfig

    return TrainConfig


@click.command(cls=SettingsCommand, settings=_settings)
@click.option(
    "--config",
    "run_file",
    cls=GroupedOption,
    group="Run",
    type=FILE,
    is_eager=True,
    expose_value=False,
    callback=_use_run_file,
    help="YAML file with these options, such as a run's run.yaml; options given here come first.",
)
def train(**settings: Any) -> None:
    """Train sparse autoencoders on all layers of a store, without the transformer.

    Options that say "several" take several values, as in -k 16,32 or -k 16 -k 32: every combination
    is an SAE, in its own directory below --out, and one pass over the store trains all.
    """
    from mlsae.train import run_sweep
    from mlsae.train.options import make_sweep

    # Each step would otherwise ask the system for all its pages anew.
    keep_freed_memory()
    run_sweep(make_sweep(settings))
