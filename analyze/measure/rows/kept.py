"""Sums over rows as facts and arrays, from which they are made again."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy.typing as npt
import torch

from mlsae.analyze.measure.rows.joint import JointResult
from mlsae.analyze.measure.rows.sums import LatentSums, RowSums
from mlsae.analyze.measure.rows.walk import LayerSums
from mlsae.analyze.results.records import part_record

Arrays = Mapping[str, npt.NDArray[Any]]

_ROWS = ("eligible", "position_0_in", "position_0_out")
_ARRAYS = tuple(field.name for field in fields(RowSums))
_OVER_LAYERS = ("token_variances", "token_entropies", "num_token_ids")


def packed(
    sums: Mapping[int, LayerSums], joint: JointResult
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Facts, which are JSON, and arrays by name."""
    facts = {
        "layer_variance": joint.layer_variance,
        "layers": [
            {
                "layer": layer,
                "adjacent_cosine": of.adjacent_cosine,
                "events": [asdict(record) for record in of.events],
            }
            for layer, of in sums.items()
        ],
    }
    arrays = {name: getattr(joint, name) for name in _OVER_LAYERS}
    for layer, of in sums.items():
        arrays[f"{layer}/count"] = of.latents.count.cpu().numpy()
        arrays[f"{layer}/total"] = of.latents.total.cpu().numpy()
        arrays[f"{layer}/prefixes"] = of.prefixes
        for rows in _ROWS:
            of_rows = getattr(of, rows)
            arrays |= {f"{layer}/{rows}/{name}": getattr(of_rows, name) for name in _ARRAYS}
    return facts, arrays


def unpacked(facts: Mapping[str, Any], arrays: Arrays) -> tuple[dict[int, LayerSums], JointResult]:
    """Sums that `packed` took apart, their tensors on the CPU."""
    sums = {}
    for of in facts["layers"]:
        layer = of["layer"]
        latents = LatentSums(len(arrays[f"{layer}/count"]), torch.device("cpu"))
        latents.count.copy_(torch.from_numpy(arrays[f"{layer}/count"]))
        latents.total.copy_(torch.from_numpy(arrays[f"{layer}/total"]))
        rows = {
            name: RowSums(**{each: arrays[f"{layer}/{name}/{each}"] for each in _ARRAYS})
            for name in _ROWS
        }
        sums[layer] = LayerSums(
            **rows,
            latents=latents,
            prefixes=arrays[f"{layer}/prefixes"],
            adjacent_cosine=of["adjacent_cosine"],
            events=tuple(part_record(record) for record in of["events"]),
        )
    joint = JointResult(
        layer_variance=facts["layer_variance"], **{name: arrays[name] for name in _OVER_LAYERS}
    )
    return sums, joint
