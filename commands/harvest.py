"""The command `mlsae harvest`."""

from typing import Any

import click

from mlsae.base.machine.heap import keep_freed_memory
from mlsae.commands.options import SettingsCommand


def _settings() -> type[Any]:
    from mlsae.harvest.config import HarvestConfig

    return HarvestConfig


@click.command(cls=SettingsCommand, settings=_settings)
def harvest(**settings: Any) -> None:
    """Run a transformer over text once and store the activations of its layers.

    \b
    --encoding     bytes an activation, FVU added, CPU time to read (stories260k)
    auto           bfloat16 for a model in bfloat16, else float16
    float16        2.00  6e-8  1     magnitudes up to 65,504
    bfloat16       2.00  4e-6  0.7   any magnitude
    float32        4.00  0     1     what the model computed
    int8           1.02  4e-5  1.7   half the disk
    float16-zstd   1.85  6e-8  3.1   less to send, slower to read
    bfloat16-zstd  1.51  4e-6  3.5   the same
    float32-zstd   3.54  0     5.2   the same
    int8-zstd      0.96  4e-5  4.1   the least to send
    """
    from mlsae.base.devices import resolve_device
    from mlsae.harvest import HarvestConfig, run

    config = HarvestConfig(**settings)
    if resolve_device(config.device).type == "cpu":
        # Each forward pass would otherwise ask the system for all its pages anew.
        keep_freed_memory()
    run(config)
