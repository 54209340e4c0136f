"""Architectures of SAEs, a file each, found by name; messages name them in this order."""

from mlsae.sae.architectures.base import Architecture, get, register, registered
from mlsae.sae.architectures.relu import ReLU, ReLUSettings
from mlsae.sae.architectures.topk import TopK, TopKSettings

register(TopK)
register(ReLU)

__all__ = [
    "Architecture",
    "ReLU",
    "ReLUSettings",
    "TopK",
    "TopKSettings",
    "get",
    "register",
    "registered",
]
