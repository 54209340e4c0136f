"""The format of SAELens, from version 6 on: cfg.json and sae_weights.safetensors, a folder a layer.

Its `layer_norm` divides by the unbiased standard deviation plus 1e-5 and multiplies by the standard
deviation alone on the way back: our standardisation exactly. Its `standard` architecture is our
relu; its `jumprelu` is any of ours with latents above a threshold; its `gated` is read as such a
one. Source: `sae_lens/saes/sae.py`, `topk_sae.py`, `standard_sae.py`, `jumprelu_sae.py` and
`gated_sae.py` of https://github.com/jbloomAus/SAELens.

Shape suffixes: D channels, N latents.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    origin_of_module,
    our_record,
    read_safetensors,
    read_settings,
    require,
    settings_of,
    take,
    trained_on,
    understood,
    widths_of,
)
from mlsae.sae.formats.weights import Tensors, at_layer, subtracting, ungated, with_norms
from mlsae.sae.model import SAE

_NAME = "saelens"
_JUMPRELU, _GATED = "jumprelu", "gated"
_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_VERSION = "6.0.0"
"""A configuration without a version, or with an earlier one, is taken for the older layout."""
_NORM, _SHAPE = "normalize_activations", "reshape_activations"
_NORMALIZE = ("none", "layer_norm")
_HARMLESS = (
    *("architecture", "d_in", "d_sae", "k", "apply_b_dec_to_input", _NORM, _SHAPE, "metadata"),
    *("rescale_acts_by_decoder_norm", "dtype", "device"),
    *("decoder_init_norm", "aux_loss_coefficient", "use_sparse_activations"),
    *("l1_coefficient", "lp_norm", "l1_warm_up_steps"),
    *("jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode"),
    *("jumprelu_tanh_scale", "jumprelu_ste_to_input", "pre_act_loss_coefficient"),
    *("l0_coefficient", "l0_warm_up_steps", "target_l0"),
)
"""Entries that are read elsewhere, or were of training alone."""
_METADATA = (
    *("sae_lens_version", "sae_lens_training_version", "model_name", "hook_name", OURS),
    *("model_from_pretrained_kwargs", "model_class_name", "hook_layer", "dataset_path"),
    *("dataset_trust_remote_code", "context_size", "prepend_bos", "seqpos_slice"),
    *("exclude_special_tokens", "sequence_separator_token", "disable_concat_sequences"),
    *("neuronpedia_id", "training_tokens", "artifacts_path"),
    *("training_architecture", "training_architecture_details", "l0", "num_dead_features"),
)
"""Entries of the metadata that say nothing of the encoder's input, or are read elsewhere."""
_MODEL = (
    *("fold_ln", "fold_value_biases", "center_unembed", "refactor_factored_attn_matrices"),
    *(
        "dtype",
        "torch_dtype",
        "device",
        "device_map",
        "n_devices",
        "trust_remote_code",
        "cache_dir",
    ),
    *("local_files_only", "low_cpu_mem_usage", "default_prepend_bos", "default_padding_side"),
    *("attn_implementation", "token"),
)
"""Ways to load the model that leave its activations as they are."""
_HOOK = re.compile(rf"blocks\.(\d+)\.hook_({'|'.join(SITES)})")


def _read(directory: Path, config: Mapping[str, Any]) -> Foreign:
    path = directory / _CONFIG
    metadata = config.get("metadata")
    if not isinstance(metadata, Mapping) or "sae_lens_version" not in metadata:
        raise ConversionError(
            f"{path} was not written by SAELens 6 or later: load it with SAELens 6 and save it "
            f"again"
        )
    kind = _check(config, path)
    _check_input(metadata, path)
    tensors, changes = _tensors(directory / _WEIGHTS, config, path)
    if not config.get("apply_b_dec_to_input", True):
        tensors, more = subtracting(tensors)
        changes += more
    if config.get("rescale_acts_by_decoder_norm"):
        tensors, more = with_norms(tensors)
        changes += more
    normalize = "standardize" if config.get(_NORM) == "layer_norm" else "none"
    architecture = read_settings(kind, _NAME, config, path)
    return assemble(
        tensors,
        architecture,
        normalize,
        _origin(metadata),
        changes=changes,
        widths=widths_of(metadata.get(OURS)),
    )


def _tensors(
    weights: Path, config: Mapping[str, Any], path: Path
) -> tuple[Tensors, tuple[str, ...]]:
    """Weights in our terms, but for the bias that is subtracted; and what changed."""
    d_in, d_sae = require(config, "d_in", path, int), require(config, "d_sae", path, int)
    name = str(config.get("architecture", "standard"))
    by_latent = {
        _GATED: ("b_gate", "b_mag", "r_mag"),
        _JUMPRELU: ("b_enc", "threshold"),
    }.get(name, ("b_enc",))
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes |= dict.fromkeys(by_latent, (d_sae,))
    found = take(read_safetensors(weights), shapes, weights)
    W_enc = found.pop("W_enc").T.contiguous()
    tensors = {"W_enc": W_enc, "W_dec": found.pop("W_dec"), "b": found.pop("b_dec")}
    if name != _GATED:
        return tensors | found, ()
    gated, changes = ungated(W_enc, found["b_gate"], found["b_mag"], found["r_mag"])
    return tensors | gated, changes


def _check(config: Mapping[str, Any], path: Path) -> type[Architecture]:
    """Architecture of a configuration; one that SAELens computes in another way is refused."""
    theirs = config.get("architecture", "standard")
    found = named(_NAME, _JUMPRELU if theirs == _GATED else theirs)
    # Reason, key, default of SAELens, values that are understood.
    for reason, key, default, allowed in (
        (
            f"of architecture {{}}; {understood(_NAME)} and {_GATED} are understood",
            "architecture",
            "standard",
            () if found is None else (theirs,),
        ),
        (
            "normalised by {}, which needs more than its files hold, or another formula; none and "
            "layer_norm are understood",
            _NORM,
            "none",
            _NORMALIZE,
        ),
        ("with apply_b_dec_to_input {}", "apply_b_dec_to_input", True, (True, False)),
        ("of rows in another shape (reshape_activations is {})", _SHAPE, "none", ("none",)),
    ):
        value = config.get(key, default)
        if value not in allowed:
            raise ConversionError(
                f"{path} cannot be imported exactly: it is an SAE {reason.format(repr(value))}"
            )
    check_entries(config, path, harmless=_HARMLESS)
    assert found is not None
    return found[0]


def _check_input(metadata: Mapping[str, Any], path: Path) -> None:
    """Refuse an SAE of other activations than those of the model as it was published."""
    check_entries(
        metadata,
        path,
        harmless=_METADATA,
        decided={
            "hook_head_index": (None,),
            "hook_head_index_out": (None,),
            "hook_name_out": (None, metadata.get("hook_name")),
            "finetuning_scaling_factor": (None, False),
        },
        within="metadata.",
    )
    processing = metadata.get("model_from_pretrained_kwargs")
    if isinstance(processing, Mapping):
        check_entries(
            processing,
            path,
            harmless=_MODEL,
            decided={"center_writing_weights": (False,), "revision": (None, "main")},
            within="metadata.model_from_pretrained_kwargs.",
        )


def _origin(metadata: Mapping[str, Any]) -> Origin:
    hook, model = metadata.get("hook_name"), metadata.get("model_name")
    origin = Origin()
    if isinstance(hook, str):
        named = _HOOK.fullmatch(hook)
        origin = Origin(site=named[2], layers=(int(named[1]),)) if named else origin_of_module(hook)
    return trained_on(metadata.get(OURS), model if isinstance(model, str) else None, origin)


def _obstacle(sae: SAE, _origin: Origin) -> str | None:
    return no_place(sae, _NAME, standardizes=True)


def _weights(sae: SAE, layer: int | None) -> bytes:
    ours = at_layer(sae, layer)
    tensors = {
        "W_enc": ours["W_enc"].T,
        "b_enc": ours["b_enc"],
        "W_dec": ours["W_dec"],
        "b_dec": ours["b"],
    }
    if "threshold" in ours:
        tensors["threshold"] = ours["threshold"]
    return serialized(tensors)


def _configuration(sae: SAE, origin: Origin, layer: int | None) -> dict[str, Any]:
    return {
        "architecture": conversion(sae, _NAME).name,
        "d_in": sae.config.d_in,
        "d_sae": sae.config.num_latents,
        **settings_of(sae, _NAME),
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        _NORM: "layer_norm" if sae.config.normalize == "standardize" else "none",
        _SHAPE: "none",
        "metadata": {
            "sae_lens_version": _VERSION,
            "sae_lens_training_version": None,
            "model_name": origin.model,
            "model_class_name": "HookedTransformer",
            "hook_name": f"blocks.{layer}.hook_{origin.site}",
            "hook_head_index": None,
            # Activations come from the model as it was published, not centred.
            "model_from_pretrained_kwargs": {"center_writing_weights": False},
            OURS: our_record(sae, origin),
        },
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
