"""The format of dictionary_learning: config.json and ae.pt, a folder a layer.

Its AutoEncoderTopK is our topk, its AutoEncoder our relu (whose decoder rows its own loader makes
unit, and scales latents to match: the same function, rounded again). It has no place for a
normalisation of rows: the factor that its trainer may scale activations by is put into the biases
when it saves. Source: `dictionary_learning/dictionary.py`, `trainers/top_k.py`,
`trainers/standard.py` and `utils.py` of
https://github.com/saprmarks/dictionary_learning.

Shape suffixes: D channels, N latents.
"""

import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlsae.base.files import stand_in
from mlsae.base.words import SITES
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
    layers_of,
    named,
    no_place,
    read_settings,
    require,
    settings_of,
    take,
    trained_on,
    understood,
)
from mlsae.sae.model import SAE

_NAME = "dictionary-learning"
_CONFIG, _WEIGHTS = "config.json", "ae.pt"
_HARMLESS = (
    *("dict_class", "k", "submodule_name", "layer", "lm_name", OURS),
    *("activation_dim", "dict_size", "device", "wandb_name", "seed", "steps", "lr", "l1_penalty"),
    *("warmup_steps", "sparsity_warmup_steps", "resample_steps", "decay_start", "auxk_alpha"),
    *("threshold_beta", "threshold_start_step"),
)
"""Entries of a trainer that are read elsewhere, or were of training alone."""
_DECIDED = {
    "trainer_class": ("TopKTrainer", "StandardTrainer", "StandardTrainerAprilUpdate"),
}
_BUFFER = (
    *("d_submodule", "layer", "n_ctxs", "ctx_len", "refresh_batch_size", "out_batch_size"),
    "device",
)
"""Entries of a buffer that were of training alone; `io` says which side of the module is meant."""
_SUBMODULE = re.compile(rf"({'|'.join(SITES)})_layer_(\d+)")


def _read(directory: Path, config: Mapping[str, Any]) -> Foreign:
    path = directory / _CONFIG
    trainer = require(config, "trainer", path, dict)
    found_class = trainer.get("dict_class")
    found = named(_NAME, found_class)
    if found is None:
        raise ConversionError(
            f"{path} cannot be imported exactly: it is a {found_class}, and what is understood is "
            f"{understood(_NAME)}"
        )
    kind, theirs = found
    check_entries(config, path, harmless=("trainer", "buffer"))
    check_entries(trainer, path, harmless=_HARMLESS, decided=_DECIDED, within="trainer.")
    if isinstance(buffer := config.get("buffer"), Mapping):
        decided = {"io": ("out",)}
        check_entries(buffer, path, harmless=_BUFFER, decided=decided, within="buffer.")
    weights = directory / _WEIGHTS
    state = _load(weights)
    if "ae" in state:
        raise ConversionError(
            f"{weights} is the backup of a run that did not finish; import the {_WEIGHTS} of one "
            f"that did"
        )
    architecture = read_settings(kind, _NAME, trainer, path)
    shape = _shape(state, weights)
    shapes = {
        "encoder.weight": shape,
        "encoder.bias": shape[:1],
        "decoder.weight": shape[::-1],
        theirs.bias: shape[1:],
    }
    read = take(state, shapes, weights, ignored=theirs.copies(architecture))
    for name in theirs.settings:
        ours = getattr(architecture, name)
        if name in state and (other := state[name].tolist()) != ours:
            raise ConversionError(f"{path} says {name} {ours}, {weights} has {other}")
    tensors = {
        "W_enc": read["encoder.weight"],
        "W_dec": read["decoder.weight"].T.contiguous(),
        "b": read[theirs.bias],
        "b_enc": read["encoder.bias"],
    }
    return assemble(tensors, architecture, "none", _origin(trainer))


def _load(path: Path) -> Tensors:
    """Tensors by name; nothing in the file is executed."""
    try:
        with warnings.catch_warnings():
            # torch warns of a pickle that it did not write: the error below says enough.
            warnings.simplefilter("ignore", UserWarning)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Bytes that are no pickle raise whatever they happen to lead to.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if found := stand_in(path):
            raise ConversionError(f"{path} {found}") from None
        raise ConversionError(
            f"{path} is damaged or holds more than tensors, which is never run: {reason[0]}"
        ) from None
    if not isinstance(state, dict):
        raise ConversionError(f"{path}: expected tensors by name, got {type(state).__name__}")
    return state


def _shape(state: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    if any(not isinstance(t, torch.Tensor) for t in state.values()):
        raise ConversionError(f"{path}: expected tensors by name, and it holds something else")
    encoder = state.get("encoder.weight")
    if encoder is None or encoder.ndim != 2:
        raise ConversionError(f"{path} has no encoder.weight of shape (dict_size, activation_dim)")
    return tuple(encoder.shape)


def _origin(trainer: Mapping[str, Any]) -> Origin:
    submodule, layer, model = (trainer.get(key) for key in ("submodule_name", "layer", "lm_name"))
    named = _SUBMODULE.fullmatch(submodule) if isinstance(submodule, str) else None
    fallback = Origin(
        site=named[1] if named else None,
        layers=layers_of([layer]),
    )
    return trained_on(trainer.get(OURS), model if isinstance(model, str) else None, fallback)


def _obstacle(sae: SAE, _origin: Origin) -> str | None:
    return no_place(sae, _NAME, normalize=("none",))


def _weights(sae: SAE) -> bytes:
    theirs = conversion(sae, _NAME)
    tensors = theirs.copies(sae.architecture) | {
        "encoder.weight": sae.W_enc,
        "encoder.bias": encoder_bias(sae),
        "decoder.weight": sae.W_dec.T,
        theirs.bias: sae.b,
    }
    buffer = io.BytesIO()
    # A copy of each, or the whole storage behind a view would be saved.
    torch.save({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, buffer)
    return buffer.getvalue()


def _configuration(sae: SAE, origin: Origin, layer: int | None) -> dict[str, Any]:
    return {
        "trainer": {
            "dict_class": conversion(sae, _NAME).name,
            **settings_of(sae, _NAME),
            "activation_dim": sae.config.d_in,
            "dict_size": sae.config.num_latents,
            "layer": layer,
            "lm_name": origin.model,
            "submodule_name": f"{origin.site}_layer_{layer}",
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
    folder=lambda site, layer: f"{site}_layer_{layer}/trainer_0",
)
