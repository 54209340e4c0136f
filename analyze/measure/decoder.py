"""Geometry of an SAE's decoder: columns in `latents`, histograms, overall numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from mlsae.analyze.measure.directions import (
    DecoderPairs,
    Float,
    Nearest,
    decoder_pairs,
    nearest_rows,
)
from mlsae.analyze.pairing import Pairing

if TYPE_CHECKING:
    from mlsae.models import Transformer


@dataclass(frozen=True, eq=False)
class Decoder:
    """An SAE's decoder directions, among themselves and beside the embeddings."""

    pairs: DecoderPairs
    """Cosines between two decoder directions."""

    embedding: Nearest | None
    """Token embedding rows; None where no transformer is at hand, or with another width."""

    unembedding: Nearest | None
    """Rows in the head that predicts tokens; None likewise."""

    def columns(self) -> dict[str, pa.Array]:
        """Columns in `latents` about its decoder direction."""
        num_latents = len(self.pairs.nearest.cosines)
        return {
            **_columns("decoder_cosine", "decoder_latent", self.pairs.nearest, num_latents),
            **_columns("embedding_cosine", "embedding_token", self.embedding, num_latents),
            **_columns("unembedding_cosine", "unembedding_token", self.unembedding, num_latents),
        }

    def summary(self) -> dict[str, float | None]:
        """The means over latents, under `decoder` in a summary."""
        return {
            "mmcs": self.pairs.mmcs,
            "mmcs_published": self.pairs.mmcs_published,
            "mean_embedding_cosine": _mean(self.embedding),
            "mean_unembedding_cosine": _mean(self.unembedding),
        }


def describe_decoder(
    pairing: Pairing,
    layer_means_M: Float,
    transformer: "Transformer | None",
    progress: Callable[[int], object],
) -> Decoder:
    """Compare the decoder's directions with each other, and with the transformer's embeddings.

    Args:
        pairing: the SAE's pairing.
        layer_means_M: mean layer by latent; NaN for a dead one.
        transformer: the one that the store was made with, if it is at hand.
        progress: told the number of latent pairs in each finished block.
    """
    directions = pairing.sae.W_dec.detach()
    span = max(pairing.layers) - min(pairing.layers)
    pairs = decoder_pairs(directions, layer_means_M, span, progress)
    model = None if transformer is None else transformer.model
    return Decoder(
        pairs,
        _nearest(directions, None if model is None else model.get_input_embeddings()),
        _nearest(directions, None if model is None else model.get_output_embeddings()),
    )


def _nearest(directions_MD: torch.Tensor, embedding: Any) -> Nearest | None:
    weight = getattr(embedding, "weight", None)
    if weight is None or weight.shape[1] != directions_MD.shape[1]:
        return None
    return nearest_rows(directions_MD, weight.detach())


def _columns(
    cosine: str, index: str, nearest: Nearest | None, num_latents: int
) -> dict[str, pa.Array]:
    if nearest is None:
        return {
            cosine: pa.nulls(num_latents, pa.float64()),
            index: pa.nulls(num_latents, pa.int32()),
        }
    return {
        cosine: pa.array(nearest.cosines, mask=np.isnan(nearest.cosines)),
        index: pa.array(nearest.indices.astype(np.int32), mask=nearest.indices < 0),
    }


def _mean(nearest: Nearest | None) -> float | None:
    return None if nearest is None else float(nearest.cosines.mean())
