"""A store and an SAE → tables, figures, a summary."""

from mlsae.analyze.config import AnalyzeConfig
from mlsae.analyze.pipeline import run
from mlsae.analyze.results import Analysis, load

__all__ = ["Analysis", "AnalyzeConfig", "load", "run"]
