"""Tables in the format of the data sets published beside the original multi-layer SAEs.

Source: `mlsae/analysis/dists.py` and `examples.py` of https://github.com/tim-lawson/mlsae at
ba90c51, whose classes `Dists` and `Examples` read what is written here.
"""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pd

from mlsae.analyze.results.analysis import Analysis
from mlsae.base.errors import InputError

_FLOATS = pa.list_(pa.float64())

COMPANION_DISTS = pa.schema(
    [
        ("latent", pa.int64()),
        *((name, pa.float64()) for name in ("count", "total", "mean")),
        *((name, pa.float64()) for name in ("layer_mean", "layer_var", "layer_std")),
        *((name, _FLOATS) for name in ("counts", "totals", "means", "probs")),
    ]
)
"""Columns of `tim-lawson/mlsae-…-dists`."""

COMPANION_EXAMPLES = pa.schema(
    [
        *((name, pa.int64()) for name in ("latent", "layer", "token_id")),
        ("token", pa.string()),
        ("act", pa.float64()),
        *((name, pa.string()) for name in ("token_ids", "tokens", "acts")),
    ]
)
"""Columns of `tim-lawson/mlsae-…-examples` but for the row number `id`; the last three are JSON."""


def dists(source: Analysis | pa.Table) -> pa.Table:
    """The distributions over layers, one row a latent: the columns of `COMPANION_DISTS`.

    A layer is given by its place among the SAE's layers, from 0, as in the published code; lists
    are in that order. For a dead latent, `mean` and `means` are 0, `probs` and the columns derived
    from them NaN. The published data sets count and sum every selected latent; here a value must be
    above 0.

    Args:
        source: an analysis, or its table `latent_layers`.
    """
    latent_layers = source.latent_layers if isinstance(source, Analysis) else source
    num_layers = len(pc.unique(latent_layers["layer"]))
    ordered = latent_layers.sort_by([("latent", "ascending"), ("layer", "ascending")])
    counts, totals = (
        ordered[name].to_numpy().astype(np.float64).reshape(-1, num_layers)
        for name in ("count", "total")
    )
    layers = np.arange(num_layers)
    with np.errstate(invalid="ignore"):
        probs = totals / totals.sum(axis=1, keepdims=True)
        layer_mean = probs @ layers
        layer_var = (probs * (layers - layer_mean[:, None]) ** 2).sum(axis=1)
    return pa.table(
        [
            ordered["latent"].to_numpy()[::num_layers].astype(np.int64),
            counts.sum(axis=1),
            totals.sum(axis=1),
            _ratio(totals.sum(axis=1), counts.sum(axis=1)),
            layer_mean,
            layer_var,
            np.sqrt(layer_var),
            *(_lists(of) for of in (counts, totals, _ratio(totals, counts), probs)),
        ],
        schema=COMPANION_DISTS,
    )


def examples(source: Analysis | pa.Table | pd.Dataset) -> pa.Table:
    """The events of largest values of each latent at each layer, as `COMPANION_EXAMPLES` says.

    By latent, layer and falling `act`. `layer` is the layer's id. `tokens` are the texts of tokens,
    where the published data sets have the vocabulary's spelling (`Ġthe`), and `token` and `tokens`
    are null where the analysis had no tokenizer. Windows are as the analysis chose them, and values
    are not rounded to float16.

    Args:
        source: an analysis, or its table `examples`, in memory or as `load` gives it.

    Raises:
        InputError: the analysis was made without examples.
    """
    table = source.examples if isinstance(source, Analysis) else source
    if table is None:
        raise InputError("the analysis was made without examples: analyze with --examples above 0")
    wanted = pc.field("kind") == "top_layer"
    if isinstance(table, pd.Dataset):
        chosen = table.to_table(filter=wanted)
    else:
        chosen = table.filter(wanted)
    order = [("latent", "ascending"), ("layer", "ascending"), ("rank", "ascending")]
    rows = [_example(row) for row in chosen.sort_by(order).to_pylist()]
    return pa.Table.from_pylist(rows, schema=COMPANION_EXAMPLES)


def _example(row: dict[str, Any]) -> dict[str, Any]:
    peak, pieces = row["peak"], row["pieces"]
    return {
        "latent": row["latent"],
        "layer": row["layer"],
        "token_id": row["token_ids"][peak],
        "token": None if pieces is None else pieces[peak],
        "act": row["value"],
        "token_ids": json.dumps(row["token_ids"]),
        "tokens": None if pieces is None else json.dumps(pieces),
        "acts": json.dumps(row["values"]),
    }


def _ratio(
    total: npt.NDArray[np.float64], count: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """total / count, and 0 for a count of 0."""
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


def _lists(values: npt.NDArray[np.float64]) -> pa.Array:
    # Arrow refuses offsets that its lists cannot hold.
    offsets = pa.array(np.arange(len(values) + 1) * values.shape[1], pa.int32())
    return pa.ListArray.from_arrays(offsets, values.ravel())
