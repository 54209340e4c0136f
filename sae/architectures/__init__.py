"""Architectures of SAEs, a file each, found by name; messages name them in this order."""

from mlsae.base.settings import settings
from mlsae.sae.architectures.base import Architecture, get, register, registered
from mlsae.sae.architectures.relu import ReLU, ReLUSettings
from mlsae.sae.architectures.topk import TopK, TopKSettings

register(TopK)
register(ReLU)


@settings
class ArchitectureSettings(ReLUSettings, TopKSettings):
    """Training settings of all architectures, which a run's settings contain."""


__all__ = [
    "Architecture",
    "ArchitectureSettings",
    "ReLU",
    "ReLUSettings",
    "TopK",
    "TopKSettings",
    "get",
    "register",
    "registered",
]
