"""Sparse autoencoders: encode rows of any layer to a few latents, and back.

```python
sae = mlsae.sae.load("runs/a")
latents = sae.encode(x)  # x (..., d_in): at most k latents a row
x_hat = sae.decode(latents)
```
"""

from mlsae.sae.architectures.base import Architecture
from mlsae.sae.architectures.relu import ReLU
from mlsae.sae.architectures.topk import TopK
from mlsae.sae.config import SAEConfig
from mlsae.sae.errors import DamagedSAEError, NotAnSAEError, SAEError
from mlsae.sae.linear import LinearForm
from mlsae.sae.model import SAE, Latents, load

__all__ = [
    "SAE",
    "Architecture",
    "DamagedSAEError",
    "Latents",
    "LinearForm",
    "NotAnSAEError",
    "ReLU",
    "SAEConfig",
    "SAEError",
    "TopK",
    "load",
]
