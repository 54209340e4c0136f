"""The format of the published multi-layer SAEs: config.json and model.safetensors, for all layers.

Repositories `tim-lawson/mlsae-…` on the hub have this format. A repository whose name ends in
`-tfm` has the transformer in the same file, with the SAE's tensors under `autoencoder.`; no others
are read.
Source: `mlsae/model/autoencoder.py` and `lightning.py` of https://github.com/tim-lawson/mlsae.

Shape suffixes: D channels, N latents.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlsae.sae.architectures import TopK
from mlsae.sae.directory import serialized
from mlsae.sae.formats.common import (
    ConversionError,
    Foreign,
    Format,
    Origin,
    assemble,
    check_entries,
    layers_of,
    names_in,
    no_place,
    read_safetensors,
    read_settings,
    require,
    settings_of,
    take,
)
from mlsae.sae.model import SAE

_NAME = "mlsae"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_SITE = "resid_post"
_PREFIX = "autoencoder."
_HARMLESS = (
    *("k", "standardize", "layers", "model_name", "lens", "tuned_lens"),
    *("n_inputs", "n_latents", "expansion_factor", "auxk", "auxk_coef", "dead_tokens_threshold"),
    *("dead_steps_threshold", "dead_threshold", "lr", "skip_special_tokens", "max_length"),
    *("batch_size", "accumulate_grad_batches"),
)
"""Entries that are read elsewhere, or were of training alone."""
_BLOCK = re.compile(r"transformer\..*\.layers\.(\d+)\..*")


def _read(directory: Path, config: Mapping[str, Any]) -> Foreign:
    path, weights = directory / _CONFIG, directory / _WEIGHTS
    for key in ("lens", "tuned_lens"):
        if config.get(key):
            raise ConversionError(
                f"{path} cannot be imported exactly: it has a lens, a transformation of each layer "
                f"of its own ({key} is true), and SAEs here have none"
            )
    check_entries(config, path, harmless=_HARMLESS)
    names = names_in(weights)
    with_transformer = any(name.startswith(_PREFIX) for name in names)
    state = read_safetensors(weights, _PREFIX if with_transformer else "")
    encoder = state.get("encoder.weight")
    if encoder is None or encoder.ndim != 2:
        raise ConversionError(f"{weights} has no encoder.weight of shape (n_latents, n_inputs)")
    shape = tuple(encoder.shape)
    shapes = {
        "encoder.weight": shape,
        "decoder.weight": shape[::-1],
        "pre_encoder_bias": shape[1:],
    }
    found = take(state, shapes, weights, ignored=("last_nonzero",))
    tensors = {
        "W_enc": found["encoder.weight"],
        "W_dec": found["decoder.weight"].T.contiguous(),
        "b": found["pre_encoder_bias"],
    }
    normalize = "standardize" if require(config, "standardize", path, bool) else "none"
    architecture = read_settings(TopK, _NAME, config, path)
    return assemble(tensors, architecture, normalize, _origin(config, names))


def _origin(config: Mapping[str, Any], names: list[str]) -> Origin:
    model = config.get("model_name")
    # Where it does not say, it is all of them, and the transformer beside the SAE says how many.
    blocks = sorted({int(found[1]) for name in names if (found := _BLOCK.fullmatch(name))})
    return Origin(
        site=_SITE,
        layers=layers_of(config.get("layers")) or layers_of(blocks),
        model=model if isinstance(model, str) else None,
    )


def _obstacle(sae: SAE, origin: Origin) -> str | None:
    if obstacle := no_place(sae, _NAME, standardizes=True, is_by_layer=False):
        return obstacle
    if sae.b_enc is not None:
        return "the SAE has an encoder bias, and that format has no place for one"
    if origin.site not in (None, _SITE):
        return f"that format is for {_SITE}, the outputs of blocks, and the SAE has {origin.site}"
    return None


def _weights(sae: SAE, _layer: int | None) -> bytes:
    tensors = {
        "encoder.weight": sae.W_enc,
        "decoder.weight": sae.W_dec.T,
        "pre_encoder_bias": sae.b,
    }
    return serialized(tensors)


def _configuration(sae: SAE, origin: Origin, _layer: int | None) -> dict[str, Any]:
    content: dict[str, Any] = {
        "n_inputs": sae.config.d_in,
        "n_latents": sae.config.num_latents,
        **settings_of(sae, _NAME),
        # Settings of training alone, but the module cannot be made without them.
        "dead_steps_threshold": 10_000_000,
        "dead_threshold": 1e-3,
        "auxk": min(256, sae.config.num_latents),
        "standardize": sae.config.normalize == "standardize",
    }
    if origin.layers is not None:
        content["layers"] = list(origin.layers)
    return content


FORMAT = Format(
    name=_NAME,
    config_file=_CONFIG,
    weights_file=_WEIGHTS,
    read=_read,
    obstacle=_obstacle,
    weights=_weights,
    configuration=_configuration,
    folder=None,
)
