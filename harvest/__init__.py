"""Text and a transformer to an activation store."""

from mlsae.harvest.config import HarvestConfig, parse_layers
from mlsae.harvest.pipeline import HarvestResult, run

__all__ = ["HarvestConfig", "HarvestResult", "parse_layers", "run"]
