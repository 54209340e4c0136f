"""A store and an SAE → tables, figures, a summary.

```python
analysis = mlsae.analyze.load("analysis")
analysis.layers.to_pylist()  # or .latents, .latent_layers; .events is a data set
analysis.figure("layer_distribution").savefig("layers.pdf")  # analysis.figures are the names
```
"""

from pathlib import Path
from typing import TYPE_CHECKING

from mlsae.analyze.config import AnalyzeConfig, EventsConfig
from mlsae.analyze.results.analysis import Analysis, load
from mlsae.analyze.results.events import Events, latent_events, load_events

if TYPE_CHECKING:
    from mlsae.analyze.interop.delphi import DelphiCache

__all__ = [
    "Analysis",
    "AnalyzeConfig",
    "Events",
    "EventsConfig",
    "latent_events",
    "load",
    "load_events",
    "run",
    "run_events",
    "to_delphi",
]


def run(config: AnalyzeConfig) -> Analysis:
    """Analyze an SAE on a store's rows, write the directory `config.out`, print a summary.

    Where a run of this was stopped, go on from the steps that it finished.

    Raises:
        InputError: store, SAE or transformer is missing, damaged or does not fit the others, or
            `out` cannot be used.
        ResourceError: too little disk, or no such device.
        InterruptedWorkError: SIGINT or SIGTERM came; finished steps stay.
    """
    # Here, so that whoever only loads an analysis does not wait for torch and transformers.
    from mlsae.analyze.pipeline import run as analyze

    return analyze(config)


def to_delphi(
    analysis: Analysis | str | Path, out: str | Path, *, model: str | Path | None = None
) -> "DelphiCache":
    """Write the events of an analysis, or of its directory, as a latent cache of Delphi.

    See `mlsae.analyze.interop.delphi.to_delphi`.

    Raises:
        InputError: `out` holds other things, or the store keeps only some positions.
        ResourceError: too little disk, or `out` cannot be written.
    """
    from mlsae.analyze.interop.delphi import to_delphi as write

    return write(analysis, out, model=model)


def run_events(config: EventsConfig) -> Events:
    """Write every active latent of a store's rows, or go on where a run of this was stopped.

    Under torchrun or accelerate launch every rank calls this; rank r of w writes the parts r,
    r + w, …, and all of them wait for the last on the file system.

    Raises:
        InputError: store or SAE is missing, damaged or does not fit the other, `out` holds
            something else or events of other settings, or a part of the events is damaged.
        ResourceError: too little disk, the directory cannot be written, or no such device.
        InterruptedWorkError: SIGINT or SIGTERM came; the parts that are written stay.
    """
    from mlsae.analyze.events.run import run as write

    return write(config)
