"""Text and a transformer to an activation store."""

from typing import TYPE_CHECKING, Any

from mlsae.harvest.config import HarvestConfig

if TYPE_CHECKING:
    from mlsae.harvest.pipeline import HarvestResult, run

__all__ = ["HarvestConfig", "HarvestResult", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Here, so that settings and help do not wait for torch and transformers.
    import mlsae.harvest.pipeline

    return getattr(mlsae.harvest.pipeline, name)
