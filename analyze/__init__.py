"""A store and an SAE → tables, figures, a summary.

```python
analysis = mlsae.analyze.load("analysis")
analysis.layers.to_pylist()  # or .latents, .latent_layers; .activations is a data set
analysis.figure("layer_distribution").savefig("layers.pdf")  # analysis.figures are the names
```
"""

from mlsae.analyze.config import AnalyzeConfig
from mlsae.analyze.results import Analysis, load

__all__ = ["Analysis", "AnalyzeConfig", "load", "run"]


def run(config: AnalyzeConfig) -> Analysis:
    """Analyze an SAE on a store's rows, write the directory `config.out`, print a summary.

    Raises:
        InputError: store, SAE, transformer or `out` are not what they should be.
        ResourceError: too little disk, or no such device.
    """
    # Here, so that whoever only loads an analysis does not wait for torch and transformers.
    from mlsae.analyze.pipeline import run as analyze

    return analyze(config)
