"""A transformer: load it, find its blocks, capture and splice its residual stream."""

from mlsae.models.loading import load, load_for, load_tokenizer, outline
from mlsae.models.transformer import Transformer

__all__ = ["Transformer", "load", "load_for", "load_tokenizer", "outline"]
