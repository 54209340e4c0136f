"""A transformer: load it, find its blocks, capture and splice its residual stream."""

from mlsae.models.inputs import Inputs
from mlsae.models.loading import load, load_for, outline
from mlsae.models.source.tokenizer import load_tokenizer
from mlsae.models.transformer import Transformer
from mlsae.models.weights.initialization import INITS

__all__ = ["INITS", "Inputs", "Transformer", "load", "load_for", "load_tokenizer", "outline"]
