"""The format of dictionary_learning: config.json and ae.pt, a folder a layer.

Its AutoEncoderTopK is our topk, its AutoEncoder our relu (whose decoder rows its own loader makes
unit, and scales latents to match: the same function, rounded again), its BatchTopKSAE and
MatryoshkaBatchTopKSAE our batchtopk with one threshold, its JumpReluAutoEncoder, which subtracts no
bias from rows, any of ours with latents above a threshold; its GatedAutoEncoder is read as such a
one. It has no place for a normalisation of rows: the factor that its trainer may scale activations
by is put into the biases when it saves. Source: `dictionary_learning/dictionary.py`, `utils.py` and
`trainers/` of https://github.com/saprmarks/dictionary_learning.

Shape suffixes: D channels, N latents.
"""

import io
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mlsae.base.files import stand_in
from mlsae.base.words import SITES
from mlsae.sae.formats.common import (
    OURS,
    ConversionError,
    Foreign,
    Format,
    Origin,
    assemble,
    check_entries,
    conversion,
    layers_of,
    named,
    no_place,
    our_record,
    read_settings,
    require,
    settings_of,
    take,
    trained_on,
    understood,
    widths_of,
)
from mlsae.sae.formats.weights import (
    Tensors,
    at_layer,
    not_subtracting,
    subtracting,
    ungated,
)
from mlsae.sae.model import SAE

_NAME = "dictionary-learning"
_JUMPRELU, _GATED = "JumpReluAutoEncoder", "GatedAutoEncoder"
_BATCHTOPK, _MATRYOSHKA = "BatchTopKSAE", "MatryoshkaBatchTopKSAE"
_ONE_THRESHOLD = (_BATCHTOPK, _MATRYOSHKA)
_READ_AS = {_GATED: _JUMPRELU, _MATRYOSHKA: _BATCHTOPK}
"""Class → the class whose architecture here it has, once converted."""
_CONFIG, _WEIGHTS = "config.json", "ae.pt"


class _Part(NamedTuple):
    """One of a class's tensors, in our terms."""

    name: str
    is_transposed: bool = False


_GROUPS = "group_sizes"
_GATES = ("gate_bias", "mag_bias", "r_mag")
_LINEAR = {
    "encoder.weight": _Part("W_enc"),
    "encoder.bias": _Part("b_enc"),
    "decoder.weight": _Part("W_dec", is_transposed=True),
}
_MATRICES = {
    "W_enc": _Part("W_enc", is_transposed=True),
    "b_enc": _Part("b_enc"),
    "W_dec": _Part("W_dec"),
    "b_dec": _Part("b"),
    "threshold": _Part("threshold"),
}
_LAYOUTS = {
    "AutoEncoder": _LINEAR | {"bias": _Part("b")},
    "AutoEncoderTopK": _LINEAR | {"b_dec": _Part("b")},
    _BATCHTOPK: _LINEAR | {"b_dec": _Part("b"), "threshold": _Part("threshold")},
    _MATRYOSHKA: _MATRICES,
    _JUMPRELU: _MATRICES,
    _GATED: {
        "encoder.weight": _Part("W_enc"),
        "decoder.weight": _Part("W_dec", is_transposed=True),
        "decoder_bias": _Part("b"),
        **{gate: _Part(gate) for gate in _GATES},
    },
}
"""Name of a class → names of its tensors."""
_HARMLESS = (
    *("dict_class", "k", "submodule_name", "layer", "lm_name", OURS),
    *("activation_dim", "dict_size", "device", "wandb_name", "seed", "steps", "lr", "l1_penalty"),
    *("warmup_steps", "sparsity_warmup_steps", "resample_steps", "decay_start", "auxk_alpha"),
    *("threshold_beta", "threshold_start_step", "top_k_aux", "bandwidth", "sparsity_penalty"),
    *("target_l0", "group_fractions", "group_weights", "group_sizes"),
)
"""Entries of a trainer that are read elsewhere, or were of training alone."""
_DECIDED = {
    "trainer_class": (
        *("TopKTrainer", "StandardTrainer", "StandardTrainerAprilUpdate", "BatchTopKTrainer"),
        *("MatryoshkaBatchTopKTrainer", "JumpReluTrainer", "GatedSAETrainer"),
    ),
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
    name = trainer.get("dict_class")
    found = named(_NAME, _READ_AS.get(name, name))
    if found is None:
        raise ConversionError(
            f"{path} cannot be imported exactly: it is a {name}, and what is understood is "
            f"{understood(_NAME)} and {' and '.join(_READ_AS)}"
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
    for setting in theirs.settings:
        ours = getattr(architecture, setting)
        if setting in state and (other := state[setting].tolist()) != ours:
            raise ConversionError(f"{path} says {setting} {ours}, {weights} has {other}")
    widths = widths_of(trainer.get(OURS))
    repeated = {*theirs.copies(architecture)}
    if name == _MATRYOSHKA:
        widths = _widths(state, weights)
        repeated.add(_GROUPS)
    tensors, changes = _tensors(state, name, repeated, weights)
    return assemble(tensors, architecture, "none", _origin(trainer), changes, widths)


def _widths(state: Tensors, path: Path) -> tuple[int, ...]:
    """Widths of prefixes, from the sizes of the groups between them."""
    sizes = state.get(_GROUPS)
    if not isinstance(sizes, torch.Tensor) or sizes.ndim != 1 or sizes.is_floating_point():
        raise ConversionError(f"{path}: expected {_GROUPS}, a list of whole numbers")
    return tuple(sizes.cumsum(0).tolist())


def _tensors(
    state: Tensors, name: str, repeated: Collection[str], path: Path
) -> tuple[Tensors, tuple[str, ...]]:
    """Weights in our terms, and what changed."""
    layout = _LAYOUTS[name]
    num_latents, d_in = _shape(state, layout, path)
    ours = {"W_enc": (num_latents, d_in), "W_dec": (num_latents, d_in), "b": (d_in,)}
    shapes = {
        there: ours.get(part.name, (num_latents,))[:: -1 if part.is_transposed else 1]
        for there, part in layout.items()
    }
    if name in _ONE_THRESHOLD:
        shapes["threshold"] = ()
    read = take(state, shapes, path, ignored=repeated)
    found = {
        part.name: read[there].T.contiguous() if part.is_transposed else read[there]
        for there, part in layout.items()
    }
    if name in _ONE_THRESHOLD:
        # Below 0 it was never set, and latents are those above 0.
        found["threshold"] = found["threshold"].clamp(min=0).reshape(1)
    if name == _JUMPRELU:
        return subtracting(found)
    if name == _GATED:
        gates = [found.pop(gate) for gate in _GATES]
        gated, changes = ungated(found["W_enc"], *gates)
        return found | gated, changes
    return found, ()


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


def _shape(state: Mapping[str, Any], layout: Mapping[str, _Part], path: Path) -> tuple[int, int]:
    """Latents and channels, by the encoder's weights."""
    if any(not isinstance(t, torch.Tensor) for t in state.values()):
        raise ConversionError(f"{path}: expected tensors by name, and it holds something else")
    name = next(there for there, part in layout.items() if part.name == "W_enc")
    encoder = state.get(name)
    if encoder is None or encoder.ndim != 2:
        raise ConversionError(f"{path} has no {name} of dict_size and activation_dim")
    num_latents, d_in = encoder.T.shape if layout[name].is_transposed else encoder.shape
    return num_latents, d_in


def _origin(trainer: Mapping[str, Any]) -> Origin:
    submodule, layer, model = (trainer.get(key) for key in ("submodule_name", "layer", "lm_name"))
    named = _SUBMODULE.fullmatch(submodule) if isinstance(submodule, str) else None
    fallback = Origin(
        site=named[1] if named else None,
        layers=layers_of([layer]),
    )
    return trained_on(trainer.get(OURS), model if isinstance(model, str) else None, fallback)


def _obstacle(sae: SAE, _origin: Origin) -> str | None:
    return no_place(sae, _NAME)


def _class(sae: SAE) -> str:
    """Name of the class that an SAE becomes."""
    name = conversion(sae, _NAME).name
    return _MATRYOSHKA if name == _BATCHTOPK and sae.config.matryoshka_widths else name


def _weights(sae: SAE, layer: int | None) -> bytes:
    theirs, ours = conversion(sae, _NAME), at_layer(sae, layer)
    name, widths = _class(sae), sae.config.matryoshka_widths
    if name == _JUMPRELU:
        ours = not_subtracting(ours)
    if name in _ONE_THRESHOLD:
        ours["threshold"] = ours["threshold"][0]
    tensors = theirs.copies(sae.architecture) | {
        there: ours[part.name].T if part.is_transposed else ours[part.name]
        for there, part in _LAYOUTS[name].items()
    }
    if name == _MATRYOSHKA and widths is not None:
        ends = torch.tensor((0, *widths))
        tensors[_GROUPS] = ends.diff()
    buffer = io.BytesIO()
    # A copy of each, or the whole storage behind a view would be saved.
    torch.save({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, buffer)
    return buffer.getvalue()


def _configuration(sae: SAE, origin: Origin, layer: int | None) -> dict[str, Any]:
    name = _class(sae)
    return {
        "trainer": {
            "dict_class": name,
            **settings_of(sae, _NAME),
            **({"trainer_class": "MatryoshkaBatchTopKTrainer"} if name == _MATRYOSHKA else {}),
            "activation_dim": sae.config.d_in,
            "dict_size": sae.config.num_latents,
            "layer": layer,
            "lm_name": origin.model,
            "submodule_name": f"{origin.site}_layer_{layer}",
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
    folder=lambda site, layer: f"{site}_layer_{layer}/trainer_0",
)
