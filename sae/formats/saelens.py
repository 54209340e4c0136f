"""The format of SAELens, from version 6 on: cfg.json and sae_weights.safetensors, a folder a layer.

Its `layer_norm` divides by the unbiased standard deviation plus 1e-5 and multiplies by the standard
deviation alone on the way back: our standardisation exactly. Its `standard` architecture is our
relu. Source: `sae_lens/saes/sae.py`, `topk_sae.py` and `standard_sae.py` of https://github.com/jbloomAus/SAELens.

Shape suffixes: D channels, N latents.
"""

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
    Tensors,
    assemble,
    check_entries,
    conversion,
    encoder_bias,
    named,
    no_place,
    origin_of_module,
    read_safetensors,
    read_settings,
    require,
    settings_of,
    take,
    trained_on,
    understood,
)
from mlsae.sae.model import SAE

_NAME = "saelens"
_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_VERSION = "6.0.0"
"""A configuration without a version, or with an earlier one, is taken for the older layout."""
_NORM, _SHAPE = "normalize_activations", "reshape_activations"
_NORMALIZE = {"standardize": "layer_norm", "none": "none"}
_HARMLESS = (
    *("architecture", "d_in", "d_sae", "k", "apply_b_dec_to_input", _NORM, _SHAPE, "metadata"),
    *("rescale_acts_by_decoder_norm", "dtype", "device"),
    *("decoder_init_norm", "aux_loss_coefficient", "use_sparse_activations"),
    *("l1_coefficient", "lp_norm", "l1_warm_up_steps"),
)
"""Entries that are read elsewhere, or were of training alone."""
_METADATA = (
    *("sae_lens_version", "sae_lens_training_version", "model_name", "hook_name", OURS),
    *("model_from_pretrained_kwargs", "model_class_name", "hook_layer", "dataset_path"),
    *("dataset_trust_remote_code", "context_size", "prepend_bos", "seqpos_slice"),
    *("exclude_special_tokens", "sequence_separator_token", "disable_concat_sequences"),
    *("neuronpedia_id", "training_tokens", "artifacts_path"),
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
    d_in, d_sae = require(config, "d_in", path, int), require(config, "d_sae", path, int)
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    found = take(read_safetensors(directory / _WEIGHTS), shapes, directory / _WEIGHTS)
    tensors = {
        "W_enc": found["W_enc"].T.contiguous(),
        "W_dec": found["W_dec"],
        "b": found["b_dec"],
        "b_enc": found["b_enc"],
    }
    changes: tuple[str, ...] = ()
    if config.get("rescale_acts_by_decoder_norm"):
        tensors, changes = _folded(tensors)
    normalize = "standardize" if config.get(_NORM) == "layer_norm" else "none"
    architecture = read_settings(kind, _NAME, config, path)
    return assemble(tensors, architecture, normalize, _origin(metadata), changes=changes)


def _check(config: Mapping[str, Any], path: Path) -> type[Architecture]:
    """Architecture of a configuration; one that SAELens computes in another way is refused."""
    found = named(_NAME, config.get("architecture", "standard"))
    # Reason, key, default of SAELens, values that are understood.
    for reason, key, default, allowed in (
        (
            f"of architecture {{}}; {understood(_NAME)} are understood",
            "architecture",
            "standard",
            () if found is None else (found[1].name,),
        ),
        (
            "normalised by {}, which needs more than its files hold, or another formula; none and "
            "layer_norm are understood",
            _NORM,
            "none",
            tuple(_NORMALIZE.values()),
        ),
        (
            "that does not subtract its bias from the input (apply_b_dec_to_input is {})",
            "apply_b_dec_to_input",
            True,
            (True,),
        ),
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


def _folded(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """Pre-activations times the decoder's norms, and latents divided by them, put into the weights.

    Rounded to float32 once, as SAELens does when it saves an SAE for inference.
    """
    norms_N1 = torch.linalg.vector_norm(tensors["W_dec"].double(), dim=1, keepdim=True)
    if (norms_N1 == 1).all():
        return tensors, ()
    # A latent that writes nothing never reads either: its pre-activation is multiplied by 0.
    divisors_N1 = torch.where(norms_N1 > 0, norms_N1, 1)
    folded = tensors | {
        "W_enc": (tensors["W_enc"] * norms_N1).float(),
        "b_enc": (tensors["b_enc"] * norms_N1[:, 0]).float(),
        "W_dec": (tensors["W_dec"] / divisors_N1).float(),
    }
    return folded, ("decoder norms folded into the encoder, rounded to float32",)


def _origin(metadata: Mapping[str, Any]) -> Origin:
    hook, model = metadata.get("hook_name"), metadata.get("model_name")
    origin = Origin()
    if isinstance(hook, str):
        named = _HOOK.fullmatch(hook)
        origin = Origin(site=named[2], layers=(int(named[1]),)) if named else origin_of_module(hook)
    return trained_on(metadata.get(OURS), model if isinstance(model, str) else None, origin)


def _obstacle(sae: SAE, _origin: Origin) -> str | None:
    return no_place(sae, _NAME, normalize=tuple(_NORMALIZE))


def _weights(sae: SAE) -> bytes:
    tensors = {
        "W_enc": sae.W_enc.T,
        "b_enc": encoder_bias(sae),
        "W_dec": sae.W_dec,
        "b_dec": sae.b,
    }
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
        _NORM: _NORMALIZE[sae.config.normalize],
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
            OURS: {"site": origin.site, "layers": list(origin.layers or ())},
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
