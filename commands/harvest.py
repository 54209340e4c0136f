"""The command `mlsae harvest`."""

from typing import Any

import click

from mlsae.base.machine.heap import keep_freed_memory
from mlsae.commands.options import SettingsCommand


def _settings() -> type[Any]:
    from mlsae.harvest.config import HarvestConfig

    return HarvestConfig


def _costs() -> str:
    """A line on each encoding's cost."""
    from mlsae.store.format.presets import COSTS

    return "\n".join(
        [
            "--encoding     bytes an activation, FVU added, CPU time to read (stories260k)",
            "auto           bfloat16 for a model in bfloat16, else float16",
            *(
                f"{name:<15}{of.num_bytes}  {of.added_fvu:<6}{of.read_time:<6}{of.use}"
                for name, of in COSTS.items()
            ),
        ]
    )


@click.command(cls=SettingsCommand, settings=_settings, example="harvest.yaml", table=_costs)
def harvest(**settings: Any) -> None:
    """Run a transformer over text once and store its layers' activations."""
    from mlsae.base.devices import resolve_device
    from mlsae.harvest import HarvestConfig, run

    config = HarvestConfig(**settings)
    if resolve_device(config.device).type == "cpu":
        # Each forward pass would otherwise ask the system for all its pages anew.
        keep_freed_memory()
    run(config)
