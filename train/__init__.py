"""Training an SAE from an activation store; nothing here needs the transformer.

```python
from mlsae.train import TrainConfig, run

result = run(TrainConfig(cache=Path("acts"), out=Path("runs/a"), expansion_factor=16, k=16))
```
"""

from mlsae.train.config import TrainConfig
from mlsae.train.pipeline import TrainResult, run, run_sweep
from mlsae.train.sweep import Sweep

__all__ = ["Sweep", "TrainConfig", "TrainResult", "run", "run_sweep"]
