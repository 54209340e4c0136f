"""Text and a transformer to an activation store."""

from mlsae.harvest.config import HarvestConfig
from mlsae.harvest.pipeline import HarvestResult, run

__all__ = ["HarvestConfig", "HarvestResult", "run"]
