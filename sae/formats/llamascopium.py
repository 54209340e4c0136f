"""The format of Llamascopium: config.json and sae_weights.safetensors, a folder an SAE.

Its encoder subtracts no bias from rows; its `dataset-wise` normalisation is one factor for all
rows, √d over their mean norm, which lies among the weights. Thresholds are there as logarithms.
Source: `src/llamascopium/models/sae.py`, `models/sparse_dictionary.py`, `activation_functions.py`
of https://github.com/OpenMOSS/Language-Model-SAEs.

Shape suffixes: D channels, N latents.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlsae.base.words import SITES
from mlsae.sae.architectures.base import Architecture
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
    our_record,
    read_safetensors,
    require,
    take,
    trained_on,
    understood,
    widths_of,
)
from mlsae.sae.formats.weights import (
    Tensors,
    at_layer,
    divided,
    not_subtracting,
    subtracting,
    with_norms,
)
from mlsae.sae.model import SAE

_NAME = "llamascopium"
_CONFIG, _WEIGHTS = "config.json", "sae_weights.safetensors"
_LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
_MEAN_NORM = "dataset_average_activation_norm."
_HARMLESS = (
    *("d_model", "expansion_factor", "use_decoder_bias", "act_fn", "top_k", OURS),
    *("hook_point_in", "hook_point_out", "norm_activation", "sparsity_include_decoder_norm"),
    *("jumprelu_threshold_window", "use_triton_kernel"),
    *("sparsity_threshold_for_triton_spmm_kernel", "sae_pretrained_name_or_path"),
    *("strict_loading", "dtype", "device"),
)
"""Entries that are read elsewhere, or change no number."""
_HOOK = re.compile(rf"blocks\.(\d+)\.hook_({'|'.join(SITES)})")


def _read(directory: Path, config: Mapping[str, Any]) -> Foreign:
    path, weights = directory / _CONFIG, directory / _WEIGHTS
    kind, activation = _check(config, path)
    hook = config["hook_point_in"]
    tensors, factor = _tensors(weights, config, activation, path)
    changes: tuple[str, ...] = ()
    if factor != 1:
        tensors |= divided(tensors, torch.tensor(factor, dtype=torch.float64))
        changes = ("one factor for all rows put into biases and thresholds",)
    tensors, more = subtracting(tensors)
    changes += more
    if config.get("sparsity_include_decoder_norm", True) and activation != "relu":
        tensors, more = with_norms(tensors)
        changes += more
    if "threshold" in tensors:
        changes += ("thresholds taken from logarithms",)
    architecture = kind(**_settings(kind, config, path))
    origin = Origin()
    if found := _HOOK.fullmatch(hook):
        origin = Origin(site=found[2], layers=(int(found[1]),))
    record = config.get(OURS)
    return assemble(
        tensors,
        architecture,
        "none",
        trained_on(record, None, origin),
        changes=changes,
        widths=widths_of(record),
    )


def _check(config: Mapping[str, Any], path: Path) -> tuple[type[Architecture], str]:
    """Architecture of a configuration, and its name there."""
    activation = config.get("act_fn", "relu")
    found = named(_NAME, activation)
    if found is None:
        raise ConversionError(
            f"{path} cannot be imported exactly: its act_fn is {activation!r}, and understood are "
            f"{understood(_NAME)}; Llamascopium makes a jumprelu of a batchtopk"
        )
    check_entries(
        config,
        path,
        harmless=_HARMLESS,
        decided={"sae_type": ("sae",), "use_glu_encoder": (False,)},
    )
    hook = require(config, "hook_point_in", path, str)
    for key, allowed in (
        ("hook_point_out", (hook,)),
        ("norm_activation", ("inference", "dataset-wise")),
    ):
        value = config.get(key, allowed[-1])
        if value not in allowed:
            raise ConversionError(
                f"{path} cannot be imported exactly: {key} is {value!r}, and an SAE that is "
                f"imported has {' or '.join(map(repr, allowed))}"
            )
    return found[0], activation


def _tensors(
    weights: Path, config: Mapping[str, Any], activation: str, path: Path
) -> tuple[Tensors, float]:
    """Weights for rows times a factor, from which nothing is subtracted; and the factor."""
    state = read_safetensors(weights)
    d_in = require(config, "d_model", path, int)
    num_latents = int(d_in * float(require(config, "expansion_factor", path, (int, float))))
    shapes = {"W_E": (d_in, num_latents), "b_E": (num_latents,), "W_D": (num_latents, d_in)}
    if config.get("use_decoder_bias", True):
        shapes["b_D"] = (d_in,)
    if activation == "jumprelu":
        shapes[_LOG_THRESHOLD] = (num_latents,)
        # A threshold of 0 has the logarithm −∞.
        if (log := state.get(_LOG_THRESHOLD)) is not None:
            state[_LOG_THRESHOLD] = log.clamp(min=torch.finfo(torch.float16).min)
    norms = [name for name in state if name.startswith(_MEAN_NORM)]
    found = take(state, shapes, weights, ignored=norms)
    tensors = {
        "W_enc": found["W_E"].T.contiguous(),
        "b_enc": found["b_E"],
        "W_dec": found["W_D"],
        "b": found["b_D"] if "b_D" in found else torch.zeros(d_in),
    }
    if _LOG_THRESHOLD in found:
        tensors["threshold"] = found[_LOG_THRESHOLD].double().exp().float()
    if config.get("norm_activation", "dataset-wise") == "inference":
        return tensors, 1.0
    norm = state.get(f"{_MEAN_NORM}{config['hook_point_in']}")
    if norm is None or norm.numel() != 1 or not 0 < float(norm) < math.inf:
        raise ConversionError(
            f"{weights} lacks the mean norm by which rows are scaled: expected a number above 0 "
            f"as {_MEAN_NORM}{config['hook_point_in']}"
        )
    return tensors, math.sqrt(d_in) / float(norm)


def _settings(kind: type[Architecture], config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    names = kind.conversions[_NAME].settings
    return {name: require(config, f"top_{name}", path, int) for name in names}


def _obstacle(sae: SAE, _origin: Origin) -> str | None:
    return no_place(sae, _NAME)


def _weights(sae: SAE, layer: int | None) -> bytes:
    ours = not_subtracting(at_layer(sae, layer))
    tensors = {
        "W_E": ours["W_enc"].T,
        "b_E": ours["b_enc"],
        "W_D": ours["W_dec"],
        "b_D": ours["b"],
    }
    if "threshold" in ours:
        tensors[_LOG_THRESHOLD] = ours["threshold"].double().log().float()
    return serialized(tensors)


def _configuration(sae: SAE, origin: Origin, layer: int | None) -> dict[str, Any]:
    d_in, num_latents = sae.config.d_in, sae.config.num_latents
    expansion = num_latents / d_in
    while int(d_in * expansion) < num_latents:
        expansion = math.nextafter(expansion, math.inf)
    theirs, settings = conversion(sae, _NAME), sae.architecture.to_dict()
    hook = f"blocks.{layer}.hook_{origin.site}"
    return {
        "sae_type": "sae",
        "d_model": d_in,
        "expansion_factor": expansion,
        "use_decoder_bias": True,
        "act_fn": theirs.name,
        **{f"top_{name}": settings[name] for name in theirs.settings},
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
        "hook_point_in": hook,
        "hook_point_out": hook,
        "use_glu_encoder": False,
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
    folder=lambda site, layer: f"blocks.{layer}.hook_{site}",
)
