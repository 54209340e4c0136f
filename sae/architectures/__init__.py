"""Architectures of SAEs, a file each, found by name; messages name them in this order."""

from mlsae.base.settings import setting, settings
from mlsae.sae.architectures.base import Architecture, get, register, registered
from mlsae.sae.architectures.batchtopk import BatchTopK, BatchTopKSettings
from mlsae.sae.architectures.gated import Gated
from mlsae.sae.architectures.jumprelu import JumpReLU, JumpReLUSettings
from mlsae.sae.architectures.relu import ReLU, ReLUSettings
from mlsae.sae.architectures.topk import TopK, TopKSettings

register(TopK)
register(ReLU)
register(BatchTopK)
register(JumpReLU)
register(Gated)


@settings
class _Choice:
    """The architecture itself, so that its option comes before those of all architectures."""

    architecture: str = setting(
        default=TopK.name,
        decides=True,
        group="Architecture",
        swept=True,
        doc="Architecture, by the latents that a row uses: "
        + "; ".join(f"{kind.name}, {kind.summary}" for kind in registered())
        + ".",
    )


@settings
class ArchitectureSettings(JumpReLUSettings, ReLUSettings, BatchTopKSettings, _Choice):
    """Training settings of all architectures, which a run's settings contain."""


__all__ = [
    "Architecture",
    "ArchitectureSettings",
    "BatchTopK",
    "Gated",
    "JumpReLU",
    "JumpReLUSettings",
    "ReLU",
    "ReLUSettings",
    "TopK",
    "TopKSettings",
    "get",
    "register",
    "registered",
]
