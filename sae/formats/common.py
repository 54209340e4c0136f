"""Common parts for other tools' formats: reading, writing and checks.

Shape suffixes: D channels, N latents.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from mlsae.base.errors import InputError
from mlsae.base.files import stand_in
from mlsae.base.words import SITES
from mlsae.sae.architectures.base import Architecture, Conversion, registered
from mlsae.sae.config import SAEConfig
from mlsae.sae.formats.weights import Tensors
from mlsae.sae.model import SAE

OURS = "mlsae"
"""Key under which an exported configuration says which site and layers the SAE was trained on."""
_EXACT = (torch.float32, torch.float16, torch.bfloat16)


class ConversionError(InputError):
    """An SAE cannot be written in, or read from, another tool's format."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """An SAE's training data, as far as it is known."""

    site: str | None = None
    """Site in a block."""
    layers: tuple[int, ...] | None = None
    """Blocks, from 0."""
    model: str | None = None
    """The transformer's name."""


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """An SAE that another tool saved, in this package's terms."""

    config: SAEConfig
    """Shape and architecture."""
    tensors: Tensors
    """Parameters by name, a b_enc only where there is one; float32, on the CPU."""
    origin: Origin
    """Training data, as far as the files name it."""
    changes: tuple[str, ...] = ()
    """Changes to the numbers; empty where they are as they were."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """Format in which another tool saves an SAE."""

    name: str
    """Format name, for `--to`."""
    config_file: str | None
    """Name of the JSON file; None for a format without one."""
    weights_file: str
    """Name of the tensor file."""
    read: Callable[[Path, Mapping[str, Any]], Foreign]
    """Reads a directory, given its configuration, empty where it has none; raises
    ConversionError."""
    obstacle: Callable[[SAE, Origin], str | None]
    """Reason why the format cannot express an SAE exactly, to end an error; None if it can."""
    weights: Callable[[SAE, int | None], bytes]
    """The tensor file; the second argument is the layer, where the format holds one."""
    configuration: Callable[[SAE, Origin, int | None], dict[str, Any]]
    """Content for the JSON file; the third argument is the layer, where the format holds one."""
    folder: Callable[[str, int], str] | None
    """Folder for a site and layer; None for a format whose SAE covers all layers."""

    @property
    def files(self) -> tuple[str, ...]:
        """Files that a directory of this format has."""
        names = (self.config_file, self.weights_file)
        return tuple(name for name in names if name is not None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from another tool; numbers that are not finite become text.

    Raises:
        ConversionError: the file is no such JSON.
    """
    try:
        content = json.loads(path.read_bytes(), parse_constant=str, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        found = stand_in(path) or f"is no JSON: {error}"
        raise ConversionError(f"{path} {found}") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _finite(text: str) -> float | str:
    return number if math.isfinite(number := float(text)) else text


def require(config: Mapping[str, Any], key: str, path: Path, kind: type | tuple[type, ...]) -> Any:
    """A key's value.

    Raises:
        ConversionError: the value is absent, or of another kind.
    """
    value = config.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        name = kind.__name__ if isinstance(kind, type) else "number"
        raise ConversionError(f"{path}: expected {key} as {name}, got {value!r}")
    return value


def check_entries(
    config: Mapping[str, Any],
    path: Path,
    *,
    harmless: Collection[str],
    decided: Mapping[str, Collection[object]] | None = None,
    within: str = "",
) -> None:
    """Refuse entries with which an SAE may compute something else, or take another input.

    Args:
        config: a mapping of the configuration.
        path: the file.
        harmless: entries that say nothing of that, or are read elsewhere.
        decided: entry → values with which it is understood; absent, it is so always.
        within: name of the mapping within the file, with a dot; empty for the whole.

    Raises:
        ConversionError: an entry is unknown, or has another value.
    """
    allowed = decided or {}
    for key in sorted(config.keys() - set(harmless)):
        value = config[key]
        if key not in allowed:
            raise ConversionError(
                f"{path} cannot be imported exactly: {within}{key} ({value!r}) is no entry that is "
                f"understood, so what the SAE computes is not known"
            )
        if not any(value == one and type(value) is type(one) for one in allowed[key]):
            shown = " or ".join(map(repr, allowed[key]))
            raise ConversionError(
                f"{path} cannot be imported exactly: {within}{key} is {value!r}, and an SAE that "
                f"is imported has {shown}"
            )


def names_in(path: Path) -> list[str]:
    """Names of a safetensors file's tensors.

    Raises:
        ConversionError: the file is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return list(file.keys())
    except safetensors.SafetensorError as error:
        if found := stand_in(path):
            raise ConversionError(f"{path} {found}") from None
        raise ConversionError(f"{path} is damaged ({error}); fetch it again") from None


def read_safetensors(path: Path, prefix: str = "") -> Tensors:
    """The tensors whose names begin with `prefix`, which is taken off; the others are not read.

    Raises:
        ConversionError: the file is damaged.
    """
    names = [name for name in names_in(path) if name.startswith(prefix)]
    with safetensors.safe_open(path, framework="pt") as file:
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def take(
    tensors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    path: Path,
    ignored: Collection[str] = (),
) -> Tensors:
    """The named tensors as float32, all there, in the right shape, and no other beside.

    Raises:
        ConversionError: one is missing, of another shape, or of a type that float32 cannot hold;
            or there is an unknown one, with which the SAE may compute something else.
    """
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise ConversionError(f"{path} lacks the tensors {', '.join(missing)}")
    if unknown := sorted(tensors.keys() - shapes.keys() - set(ignored)):
        raise ConversionError(
            f"{path} has tensors that are not understood, so what the SAE computes is not known: "
            f"{', '.join(unknown)}"
        )
    for name, shape in shapes.items():
        found = tensors[name]
        if tuple(found.shape) != shape:
            raise ConversionError(
                f"{path}: expected {name} of shape {shape}, got {tuple(found.shape)}"
            )
        if found.dtype not in _EXACT:
            raise ConversionError(
                f"{path}: {name} is {str(found.dtype).removeprefix('torch.')}, which float32, the "
                f"type of every SAE here, does not hold exactly"
            )
        if not found.isfinite().all():
            raise ConversionError(f"{path}: {name} holds values that are not finite")
    return {name: tensors[name].to(torch.float32).contiguous() for name in shapes}


def conversions(form: str) -> dict[type[Architecture], Conversion]:
    """Each architecture's form that a format knows."""
    return {kind: kind.conversions[form] for kind in registered() if form in kind.conversions}


def conversion(sae: SAE, form: str) -> Conversion:
    """Form of an SAE's architecture in a format; `no_place` must be None for the SAE."""
    return conversions(form)[type(sae.architecture)]


def named(form: str, name: object) -> tuple[type[Architecture], Conversion] | None:
    """The architecture that a format calls so, and how it has it; None if it is not known."""
    for kind, found in conversions(form).items():
        if found.name == name and found.is_read:
            return kind, found
    return None


def understood(form: str) -> str:
    """Architecture names in a format, for a message."""
    return " and ".join(found.name for found in conversions(form).values() if found.is_read)


def settings_of(sae: SAE, form: str) -> dict[str, Any]:
    """Entries in a format's configuration that belong to the SAE's architecture."""
    found, settings = conversion(sae, form), sae.architecture.to_dict()
    return {**{name: settings[name] for name in found.settings}, **found.constants}


def read_settings(
    kind: type[Architecture], form: str, config: Mapping[str, Any], path: Path
) -> Architecture:
    """The architecture with a configuration's settings.

    Raises:
        ConversionError: one is absent, or no whole number.
    """
    names = kind.conversions[form].settings
    return kind(**{name: require(config, name, path, int) for name in names})


def assemble(
    tensors: Mapping[str, torch.Tensor],
    architecture: Architecture,
    normalize: str,
    origin: Origin,
    changes: tuple[str, ...] = (),
    widths: tuple[int, ...] | None = None,
) -> Foreign:
    """An SAE from W_enc (N, D), W_dec (N, D), b (D,), b_enc (N,) and its architecture's own.

    An all-zero b_enc is left out.

    Args:
        tensors: parameters by name.
        architecture: the architecture.
        normalize: normalisation of rows.
        origin: training data.
        changes: changes to the numbers, each in float64 and rounded once.
        widths: `SAEConfig.matryoshka_widths`.
    """
    kept = {name: tensor for name, tensor in tensors.items() if name != "b_enc" or tensor.any()}
    num_latents, d_in = kept["W_enc"].shape
    config = SAEConfig(
        d_in=d_in,
        num_latents=num_latents,
        architecture=architecture,
        normalize=normalize,
        encoder_bias="b_enc" in kept,
        matryoshka_widths=widths if architecture.nests else None,
    )
    rounded = tuple(f"{change}, rounded to float32" for change in changes)
    return Foreign(config=config, tensors=kept, origin=origin, changes=rounded)


def no_place(
    sae: SAE, form: str, *, standardizes: bool = False, is_by_layer: bool = True
) -> str | None:
    """Reason why a format cannot hold an SAE; None where it can.

    Args:
        sae: the SAE.
        form: name of the format.
        standardizes: True for a format that can standardise rows.
        is_by_layer: True for a format with a folder a layer, whose weights take the state of the
            layer (formats/weights.py).
    """
    config, known = sae.config, conversions(form)
    if type(config.architecture) not in known:
        return (
            f"the SAE has architecture {config.architecture.name}, and that format can hold only "
            f"{' and '.join(kind.name for kind in known)}"
        )
    if config.depends_on_layer and not is_by_layer:
        return (
            f"the SAE has state for each layer ({_state(config)}), and that format holds one "
            f"function for all layers"
        )
    if config.eps != SAEConfig.eps:
        return (
            f"the SAE adds {config.eps:.2g} to standard deviations, for rows that are very small, "
            f"and that format {SAEConfig.eps:g}"
        )
    if config.normalize == "standardize" and not standardizes:
        return (
            "the SAE standardises each row, and that format has no place for a normalisation; "
            "saelens and mlsae have"
        )
    return None


def _state(config: SAEConfig) -> str:
    """State that depends on the layer, for a message."""
    if config.layer_scale != "none":
        return f"layer scale {config.layer_scale}"
    if config.architecture.depends_on_layer:
        return "thresholds"
    return f"normalize {config.normalize}"


def trained_on(record: object, model: str | None, fallback: Origin) -> Origin:
    """Training data from our own record in a configuration, or `fallback` where there is none."""
    if not isinstance(record, Mapping):
        return Origin(site=fallback.site, layers=fallback.layers, model=model)
    site = record.get("site")
    return Origin(
        site=site if site in SITES else fallback.site,
        layers=layers_of(record.get("layers")) or fallback.layers,
        model=model,
    )


def our_record(sae: SAE, origin: Origin) -> dict[str, Any]:
    """Our own record in a configuration, which `trained_on` and `widths_of` read."""
    record: dict[str, Any] = {"site": origin.site, "layers": list(origin.layers or ())}
    if sae.config.matryoshka_widths is not None:
        record["matryoshka_widths"] = list(sae.config.matryoshka_widths)
    return record


def widths_of(record: object) -> tuple[int, ...] | None:
    """Widths of prefixes in our own record in a configuration; None where it has none."""
    return layers_of(record.get("matryoshka_widths")) if isinstance(record, Mapping) else None


def layers_of(value: object) -> tuple[int, ...] | None:
    """A list of layers as another tool's file has it; None where it is no such list."""
    if not isinstance(value, list) or not value:
        return None
    sound = all(type(layer) is int and layer >= 0 for layer in value)
    return tuple(value) if sound and len(set(value)) == len(value) else None


_MODULES = {
    "": "resid_post",
    ".mlp": "mlp_out",
    ".attn": "attn_out",
    ".attention": "attn_out",
    ".self_attn": "attn_out",
}


def origin_of_module(name: str) -> Origin:
    """Site and layer at a module's output, such as `layers.3.mlp` or `transformer.h.3`."""
    found = re.fullmatch(r"(?:[\w.]*\.)?(?:layers|h|blocks|layer)\.(\d+)(\.\w+)?", name)
    if found is None or (found[2] or "") not in _MODULES:
        return Origin()
    return Origin(site=_MODULES[found[2] or ""], layers=(int(found[1]),))


def joined(layers: tuple[int, ...]) -> str:
    """Layers for a message."""
    return ", ".join(str(layer) for layer in layers)
