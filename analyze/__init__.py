"""A store and an SAE → tables, figures, a summary.

```python
analysis = mlsae.analyze.load("analysis")
analysis.layers.to_pylist()  # or .latents, .latent_layers; .activations is a data set
analysis.figure("layer_distribution").savefig("layers.pdf")  # analysis.figures are the names
```
"""

from pathlib import Path
from typing import TYPE_CHECKING

from mlsae.analyze.config import AnalyzeConfig
from mlsae.analyze.results import Analysis, load

if TYPE_CHECKING:
    from mlsae.analyze.delphi import DelphiCache

__all__ = ["Analysis", "AnalyzeConfig", "load", "run", "to_delphi"]


def run(config: AnalyzeConfig) -> Analysis:
    """Analyze an SAE on a store's rows, write the directory `config.out`, print a summary.

    Raises:
        InputError: store, SAE, transformer or `out` are not what they should be.
        ResourceError: too little disk, or no such device.
    """
    # Here, so that whoever only loads an analysis does not wait for torch and transformers.
    from mlsae.analyze.pipeline import run as analyze

    return analyze(config)


def to_delphi(
    analysis: Analysis | str | Path, out: str | Path, *, model: str | Path | None = None
) -> "DelphiCache":
    """Write the events of an analysis, or of its directory, as a latent cache of Delphi.

    See `mlsae.analyze.delphi.to_delphi`.

    Raises:
        InputError: `out` holds other things, or the store keeps only some positions.
        ResourceError: too little disk, or `out` cannot be written.
    """
    from mlsae.analyze.delphi import to_delphi as write

    return write(analysis, out, model=model)
