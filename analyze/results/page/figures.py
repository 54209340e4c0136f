"""The figures of an analysis as data URIs."""

import base64
import struct
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from mlsae.analyze.results.analysis import Analysis

_CAPTIONS = {
    "reconstruction": "Reconstruction of each layer",
    "sparsity": "Active latents of a row, by layer",
    "cross_entropy": "Cost for predictions of splicing a layer",
    "norm_cosine": "Norms of the activations, and cosines of neighbouring layers",
    "layer_distribution": "P(layer | latent) of every living latent, by mean layer",
    "layer_distribution_by_count": "P(layer | latent) by counts of events, not totals of values",
    "mean_layer": "Mean layers of latents, and their distance to a whole number",
    "layer_std": "Spread of latents over layers",
    "layer_entropy": "Entropy of latents over layers",
    "bimodality": "Bimodality of latents over layers",
    "num_layers": "Number of layers at which latents are active",
    "layer_variance": "Terms of the variance of the layer",
    "density": "Densities of latents",
    "token_entropy": "Entropy of latents over token ids",
    "decoder_cosine": "Cosines of two latents’ decoder directions",
    "layer_cosine": "Decoder cosine by distance of the mean layers",
    "embedding_cosine": "Decoder directions against embedding and unembedding",
}
_PROMPT = "prompt_"
_SIZE = struct.Struct(">II")
_HEAD = 1024
"""Bytes of a PNG file in which matplotlib names its size and resolution."""
_DOTS_PER_METRE = 160 / 0.0254


def embed_figures(
    analysis: Analysis, most_bytes: int
) -> tuple[list[dict[str, Any]], list[str], int]:
    """The PNG files that are there among an analysis' figures, those of prompts last.

    Args:
        analysis: the analysis, with the files in its directory.
        most_bytes: size of all URIs; a figure that would exceed it is left out.

    Returns:
        For each figure `uri`, `name`, `caption`, `is_prompt`, and `width` and `height` in CSS
        pixels; the names of figures left out; the size of the others in bytes.
    """
    names, _ = drawn(analysis)
    names.sort(key=lambda name: PurePosixPath(name).name.startswith(_PROMPT))
    found: list[dict[str, Any]] = []
    left_out, num_bytes = [], 0
    for name in names:
        image = (analysis.path / name).read_bytes()
        uri = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        if num_bytes + len(uri) > most_bytes:
            left_out.append(name)
            continue
        num_bytes += len(uri)
        stem = PurePosixPath(name).stem
        width, height = _css_size(image)
        found.append(
            {
                "uri": uri,
                "name": name,
                "caption": _caption(stem, analysis.summary),
                "is_prompt": stem.startswith(_PROMPT),
                "width": width,
                "height": height,
            }
        )
    return found, left_out, num_bytes


def drawn(analysis: Analysis) -> tuple[list[str], list[str]]:
    """PNG files that a summary names: those that are there, and those that are not."""
    there: list[str] = []
    absent: list[str] = []
    for name in analysis.summary["figures"]:
        if name.endswith(".png"):
            (there if (analysis.path / name).is_file() else absent).append(name)
    return there, absent


def _caption(stem: str, summary: Mapping[str, Any]) -> str:
    number, prompts = stem.removeprefix(_PROMPT), summary.get("prompts") or []
    if stem.startswith(_PROMPT) and number.isdecimal() and int(number) < len(prompts):
        return f"“{prompts[int(number)]}”"
    return _CAPTIONS.get(stem, stem.replace("_", " ").capitalize())


def _css_size(image: bytes) -> tuple[int, int]:
    """Width and height at 96 to the inch, by the resolution that the file names."""
    width, height = _SIZE.unpack_from(image, 16)
    at = image.find(b"pHYs", 0, _HEAD)
    dots = _SIZE.unpack_from(image, at + 4)[0] if at > 0 else _DOTS_PER_METRE
    return round(width * 96 / (dots * 0.0254)), round(height * 96 / (dots * 0.0254))
