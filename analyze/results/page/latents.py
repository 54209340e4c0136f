"""The latents that a page shows, as compact JSON.

Shapes: N latents shown, L layers.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mlsae.base.units import counted

Int = npt.NDArray[np.int64]

MAX_LATENTS = 4096
"""Number of latents up to which all are shown."""

MAX_CELLS = 120_000
"""Most latents times layers that are shown, so fewer latents for more layers."""

COLUMNS: tuple[tuple[str, str], ...] = (
    ("density", "density"),
    ("mean", "mean value"),
    ("layer_mean", "mean layer"),
    ("layer_std", "layer spread"),
    ("layer_entropy", "layer entropy"),
    ("num_layers", "layers active"),
    ("token_entropy", "token entropy"),
    ("decoder_cosine", "decoder cosine"),
)
"""Columns of `latents` that are shown, with their names on the page."""

_MORE = ("count", "layer_var_token", "num_token_ids", "decoder_latent")
"""Columns that are shown for an opened latent alone."""


def choose(latents: pa.Table, num_layers: int) -> tuple[Int, str]:
    """Indices of the latents that are shown, and the rule that chose them, in words.

    Few latents are all shown. Of many, a third are the most frequent; a third have the widest and a
    third the narrowest spread over layers among latents at least as frequent as the median living
    one. A latent chosen twice makes room for more of the most frequent.
    """
    most = max(3, min(MAX_LATENTS, MAX_CELLS // num_layers))
    count = latents["count"].to_numpy()
    if len(count) <= most:
        return np.arange(len(count)), f"All {counted(len(count), 'latent')}."
    spread = latents["layer_std"].to_numpy()
    frequent = np.argsort(-count, kind="stable")
    living = count[count > 0]
    often = frequent[count[frequent] >= max(1, np.median(living))] if len(living) else frequent[:0]
    by_spread = often[np.argsort(spread[often], kind="stable")]
    third = most // 3
    narrow, wide = by_spread[:third], by_spread[len(by_spread) - third :]
    chosen = dict.fromkeys([*narrow.tolist(), *wide.tolist()])
    for latent in frequent.tolist():
        if len(chosen) == most:
            break
        chosen.setdefault(latent)
    return np.sort(np.array(list(chosen), dtype=np.int64)), (
        f"{len(chosen):,} of {counted(len(count), 'latent')}: the most frequent, and of those at "
        f"least as frequent as the median living one the {len(narrow):,} with the widest and the "
        f"{len(narrow):,} with the narrowest spread over layers. The table latents.parquet has "
        "all of them."
    )


def latents_data(latents: pa.Table, latent_layers: pa.Table, chosen: Int) -> dict[str, Any]:
    """Data on the shown latents for the page's script.

    Args:
        latents: the table `latents`, in the order of latents.
        latent_layers: the table `latent_layers`, by latent, then layer.
        chosen: (N,) indices of latents.

    Returns:
        `layers` (L); `latents` (N); `columns`, each with a name and N values, of four significant
        digits or null; `profile` (N · L), P(layer | latent) in thousandths, 0 for a dead
        latent; `counts` (N · L), rows at which the latent is active at the layer.
    """
    layers = pc.unique(latent_layers["layer"]).to_pylist()
    shown = latents.take(pa.array(chosen))
    probs = latent_layers["prob"].to_numpy().reshape(-1, len(layers))[chosen]
    counts = latent_layers["count"].to_numpy().reshape(-1, len(layers))[chosen]
    names = [*(name for name, _ in COLUMNS), *_MORE]
    return {
        "layers": layers,
        "latents": chosen.tolist(),
        "columns": {name: [_short(value) for value in shown[name].to_pylist()] for name in names},
        "profile": np.rint(1000 * np.nan_to_num(probs)).astype(int).ravel().tolist(),
        "counts": counts.ravel().tolist(),
    }


def _short(value: float | None) -> float | None:
    return float(f"{value:.4g}") if isinstance(value, float) else value
