"""The format of Gemma Scope: params.npz, a folder an SAE, as `layer_20/width_16k/average_l0_71`.

Its SAEs have latents above a threshold each, and subtract no bias from rows. Site and layer are
those of the names of its repositories and folders. Source: Lieberum et al. (2024), arXiv
2408.05147, and the tutorial beside https://huggingface.co/google/gemma-scope.

Shape suffixes: D channels, N latents.
"""

import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlsae.base.files import stand_in
from mlsae.sae.formats.common import (
    ConversionError,
    Foreign,
    Format,
    Origin,
    assemble,
    named,
    no_place,
    take,
)
from mlsae.sae.formats.weights import Tensors, at_layer, not_subtracting, subtracting
from mlsae.sae.model import SAE

_NAME, _WEIGHTS = "gemma-scope", "params.npz"
_RELEASE = re.compile(r"gemma-scope-\w+-(?:pt|it)-(\w+)")
_LAYER = re.compile(r"layer_(\d+)")
_SITES = {"res": "resid_post", "mlp": "mlp_out"}
"""Part of a repository's name → site; in Gemma 2, `mlp` is what is added to the stream."""


def _read(directory: Path, _config: Mapping[str, Any]) -> Foreign:
    path = directory / _WEIGHTS
    origin = _origin(directory)
    found = named(_NAME, "jumprelu")
    assert found is not None
    state = _load(path)
    encoder = state.get("W_enc")
    if encoder is None or encoder.ndim != 2:
        raise ConversionError(f"{path} has no W_enc of shape (channels, latents)")
    d_in, num_latents = encoder.shape
    shapes = {
        "W_enc": (d_in, num_latents),
        "W_dec": (num_latents, d_in),
        "b_enc": (num_latents,),
        "b_dec": (d_in,),
        "threshold": (num_latents,),
    }
    read = take(state, shapes, path)
    W_enc, b = read.pop("W_enc").T.contiguous(), read.pop("b_dec")
    tensors, changes = subtracting({**read, "W_enc": W_enc, "b": b})
    return assemble(tensors, found[0](), "none", origin, changes)


def _load(path: Path) -> Tensors:
    """Arrays by name; nothing in the file is executed."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        found = stand_in(path) or f"is damaged or holds more than numbers ({error}); fetch it again"
        raise ConversionError(f"{path} {found}") from None


def _origin(directory: Path) -> Origin:
    """Site and layer, as far as folders above the file name them.

    Raises:
        ConversionError: the rows are of no site.
    """
    parts = directory.resolve().parts
    layers = [int(found[1]) for part in parts if (found := _LAYER.fullmatch(part))]
    releases = [found[1] for part in parts if (found := _RELEASE.search(part))]
    site = None
    if releases:
        if releases[-1] not in _SITES:
            raise ConversionError(
                f"{directory} cannot be imported exactly: it is an SAE of gemma-scope's "
                f"{releases[-1]}, whose rows are of no site here; {' and '.join(_SITES)} are"
            )
        site = _SITES[releases[-1]]
    return Origin(site=site, layers=(layers[-1],) if layers else None)


def _obstacle(sae: SAE, _origin: Origin) -> str | None:
    return no_place(sae, _NAME)


def _weights(sae: SAE, layer: int | None) -> bytes:
    ours = not_subtracting(at_layer(sae, layer))
    arrays = {
        "W_enc": ours["W_enc"].T,
        "W_dec": ours["W_dec"],
        "b_enc": ours["b_enc"],
        "b_dec": ours["b"],
        "threshold": ours["threshold"],
    }
    buffer = io.BytesIO()
    named_arrays: dict[str, Any] = {n: t.contiguous().numpy() for n, t in arrays.items()}
    np.savez(buffer, **named_arrays)
    return buffer.getvalue()


FORMAT = Format(
    name=_NAME,
    config_file=None,
    weights_file=_WEIGHTS,
    read=_read,
    obstacle=_obstacle,
    weights=_weights,
    configuration=lambda _sae, _origin, _layer: {},
    folder=lambda site, layer: f"{site}/layer_{layer}",
)
