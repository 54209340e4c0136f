"""Training an SAE from an activation store; nothing here needs the transformer.

```python
from mlsae.train import TrainConfig, run

result = run(TrainConfig(cache=Path("acts"), out=Path("runs/a"), expansion_factor=16, k=16))
```
"""

from typing import TYPE_CHECKING, Any

from mlsae.train.config import TrainConfig
from mlsae.train.sweep import Sweep

if TYPE_CHECKING:
    from mlsae.train.pipeline import TrainResult, run, run_sweep

__all__ = ["Sweep", "TrainConfig", "TrainResult", "run", "run_sweep"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Here, so that help and wrong usage do not wait for all that a run needs.
    import mlsae.train.pipeline

    return getattr(mlsae.train.pipeline, name)
