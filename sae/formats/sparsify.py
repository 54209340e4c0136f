"""The format of sparsify: cfg.json and sae.safetensors, a folder a hook point, such as `layers.3`.

It has no place for a normalisation of rows. Source: `sparsify/sparse_coder.py` and
`fused_encoder.py` of https://github.com/EleutherAI/sparsify.

Shape suffixes: D channels, N latents.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlsae.sae.directory import serialized
from mlsae.sae.formats.common import (
    OURS,
    ConversionError,
    Foreign,
    Format,
    Origin,
    assemble,
    check_entries,
    conversion,
    named,
    no_place,
    origin_of_module,
    our_record,
    read_safetensors,
    read_settings,
    require,
    settings_of,
    take,
    trained_on,
    widths_of,
)
from mlsae.sae.formats.weights import at_layer
from mlsae.sae.model import SAE

_NAME = "sparsify"
_CONFIG, _WEIGHTS = "cfg.json", "sae.safetensors"
_HARMLESS = (
    *("activation", "d_in", "expansion_factor", "k", "num_latents", "skip_connection"),
    *("transcode", OURS, "multi_topk", "normalize_decoder"),
)
"""Entries that are read elsewhere, or were of training alone."""
_MODULES = {"resid_post": "layers.{}", "mlp_out": "layers.{}.mlp"}
"""Site → the module whose output it is in most transformers; the last sites are no one's output."""


def _read(directory: Path, config: Mapping[str, Any]) -> Foreign:
    path = directory / _CONFIG
    check_entries(config, path, harmless=_HARMLESS, decided={"signed": (False,)})
    known = named(_NAME, config.get("activation", "topk"))
    for key, expected in (
        ("activation", "topk" if known is None else known[1].name),
        ("transcode", False),
        ("skip_connection", False),
    ):
        if config.get(key, expected) != expected:
            raise ConversionError(
                f"{path} cannot be imported exactly: {key} is {config[key]!r}, and a TopK SAE has "
                f"{expected!r}"
            )
    assert known is not None
    d_in, num_latents = require(config, "d_in", path, int), config.get("num_latents") or 0
    if num_latents == 0:
        num_latents = d_in * require(config, "expansion_factor", path, int)
    shapes = {
        "encoder.weight": (num_latents, d_in),
        "encoder.bias": (num_latents,),
        "W_dec": (num_latents, d_in),
        "b_dec": (d_in,),
    }
    found = take(read_safetensors(directory / _WEIGHTS), shapes, directory / _WEIGHTS)
    tensors = {
        "W_enc": found["encoder.weight"],
        "W_dec": found["W_dec"],
        "b": found["b_dec"],
        "b_enc": found["encoder.bias"],
    }
    origin = trained_on(config.get(OURS), None, origin_of_module(directory.name))
    architecture = read_settings(known[0], _NAME, config, path)
    return assemble(tensors, architecture, "none", origin, widths=widths_of(config.get(OURS)))


def _obstacle(sae: SAE, origin: Origin) -> str | None:
    if obstacle := no_place(sae, _NAME):
        return obstacle
    if origin.site not in _MODULES:
        return (
            f"that format names the module whose output was encoded, and {origin.site} is none "
            f"that is the same in every transformer; {' and '.join(_MODULES)} are"
        )
    return None


def _weights(sae: SAE, layer: int | None) -> bytes:
    ours = at_layer(sae, layer)
    tensors = {
        "encoder.weight": ours["W_enc"],
        "encoder.bias": ours["b_enc"],
        "W_dec": ours["W_dec"],
        "b_dec": ours["b"],
    }
    return serialized(tensors)


def _configuration(sae: SAE, origin: Origin, _layer: int | None) -> dict[str, Any]:
    norms = torch.linalg.vector_norm(sae.W_dec.detach(), dim=1)
    return {
        "activation": conversion(sae, _NAME).name,
        "expansion_factor": max(1, sae.config.num_latents // sae.config.d_in),
        "normalize_decoder": bool(((norms - 1).abs() < 1e-4).all()),
        "num_latents": sae.config.num_latents,
        **settings_of(sae, _NAME),
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.config.d_in,
        OURS: our_record(sae, origin),
    }


FORMAT = Format(
    name=_NAME,
    config_file=_CONFIG,
    weights_file=_WEIGHTS,
    read=_read,
    obstacle=_obstacle,
    weights=_weights,
    configuration=_configuration,
    folder=lambda site, layer: _MODULES[site].format(layer),
)
