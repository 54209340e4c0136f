"""Records of a finished run: training.json, the summary by layer, the sweep's table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mlsae import __version__
from mlsae.base.units import counted, format_ranges
from mlsae.sae import SAE
from mlsae.train.data.overlap import Overlap
from mlsae.train.plan import RunPlan
from mlsae.train.running.evaluate import POSITION_0_IN, POSITION_0_OUT
from mlsae.train.running.output import LOG

FEW_STEPS = 200
"""Fewer steps leave an SAE far from where more would take it."""


def training_record(
    plan: RunPlan,
    sae: SAE,
    step: int,
    rows: int,
    metrics: Mapping[str, Any] | None,
    last_line: Mapping[str, Any],
    overlap: Overlap,
    *,
    world_size: int,
    threads: int,
    seconds: float,
) -> dict[str, Any]:
    """training.json: origin of the SAE, and facts that an analysis needs."""
    store, config = plan.store, plan.config
    model = store.source.get("model")
    return {
        "settings": plan.settings(),
        "store_id": store.store_id,
        "plan_id": store.plan_id,
        "stores": [
            {
                "store_id": member.store_id,
                "plan_id": member.plan_id,
                "tokens_sha256": member.plan.tokens_sha256,
                "num_sequences": member.num_sequences,
            }
            for member in store.stores
        ],
        "model_fingerprint": model.get("fingerprint") if isinstance(model, Mapping) else None,
        "site": plan.site,
        "layers": list(plan.layers),
        "skip_positions": config.skip_positions,
        "validation": {
            "fraction": plan.validation_fraction,
            "seed": config.order_seed,
            "num_sequences": store.num_sequences,
            "num_held_out": len(plan.validation),
            **overlap.record(),
        },
        "position": {
            "step": step,
            "rows": rows,
            "epoch_rows": plan.mixture.num_rows * len(plan.layers),
        },
        "training": {key: last_line[key] for key in ("fvu", "fvu_by_layer", "l0", "num_dead")},
        "metrics": metrics,
        "environment": {
            "mlsae": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "device": sae.b.device.type,
            "world_size": world_size,
            "threads": threads,
            "last_session_seconds": round(seconds, 3),
        },
    }


def describe_run(plans: Sequence[RunPlan], device: str) -> str:
    """Sentence that a run begins with: its SAEs, rows, steps and log."""
    plan = plans[0]
    sae, config, mixture = plan.sae, plan.config, plan.mixture
    if len(plans) == 1:
        which = f"{counted(sae.num_latents, 'latent')} ({sae.architecture.describe()})"
    else:
        which = counted(len(plans), "SAE")
    lines = [
        f"training {which} on {counted(len(mixture.layers), 'layer')} "
        f"({format_ranges(mixture.layers)}) of {plan.site}, {sae.d_in} channels, on {device}",
        f"{counted(plan.num_steps, 'step')} of {counted(mixture.batch_rows, 'row')}, "
        f"{counted(plan.num_rows, 'row')} in all; learning rate {plan.schedule.peak:.2g}; "
        f"{counted(len(plan.validation), 'sequence')} held out",
        f"log: {config.out / LOG}",
    ]
    return "\n".join(lines)


def format_summary(metrics: Mapping[str, Any] | None) -> str:
    """The validation rows by layer, for people."""
    if metrics is None:
        return "No sequence was held out: no summary of validation rows."
    outside, inside = metrics[POSITION_0_OUT], metrics[POSITION_0_IN]
    if outside["num_rows"] == 0:
        return "No row of the sequences held out counts: no summary of validation rows."
    lines = ["layer      FVU      PCA   FVU of u     L0   FVU with position 0"]
    for a, b in zip(outside["layers"], inside["layers"], strict=True):
        shown = (a["fvu"], a["fvu_pca"], a["fvu_standardized"], a["l0"], b["fvu"])
        columns = [_number(value) for value in shown]
        lines.append("{:>5} {:>8} {:>8} {:>10} {:>6} {:>21}".format(a["layer"], *columns))
    lines += _by_prefix(outside["layers"])
    directions = {entry["pca_directions"] for entry in outside["layers"]}
    lines.append(
        f"PCA: FVU of the {format_ranges(sorted(directions))} leading directions of each layer; "
        f"that of the mean alone is 1"
    )
    lines.append(
        f"dead: {counted(outside['num_dead'], 'latent')} ({outside['dead_fraction']:.2%}) unused "
        f"by all {counted(outside['num_rows'], 'validation row')}"
    )
    share, layer = max((a["silent_fraction"] or 0, -a["layer"]) for a in outside["layers"])
    silent = f"up to {share:.2%} of a layer's, at layer {-layer}" if share else "none"
    lines.append(f"rows without a latent: {silent}")
    return "\n".join(lines)


def _by_prefix(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """FVU and L0 of each prefix of the latents, at each layer; nothing without prefixes."""
    if "prefixes" not in layers[0]:
        return []
    lines = ["layer   latents      FVU   FVU of u     L0"]
    for entry in layers:
        for one in entry["prefixes"]:
            shown = [_number(one[name]) for name in ("fvu", "fvu_standardized", "l0")]
            row = (entry["layer"], one["num_latents"], *shown)
            lines.append("{:>5} {:>9} {:>8} {:>10} {:>6}".format(*row))
    return lines


def advice(finished: Sequence[tuple[RunPlan, Mapping[str, Any] | None]]) -> list[str]:
    """Warnings about finished SAEs: too few steps, and layers that PCA describes as well.

    Args:
        finished: plan and metrics of each SAE.
    """
    found = []
    if finished and (num_steps := finished[0][0].num_steps) < FEW_STEPS:
        found.append(
            f"{counted(num_steps, 'step')} may be too few: give more --epochs, a smaller "
            f"--batch-size, or harvest more text"
        )
    for plan, metrics in finished:
        entries = metrics[POSITION_0_OUT]["layers"] if metrics is not None else []
        worse = [
            entry["layer"]
            for entry in entries
            if None not in (entry["fvu"], entry["fvu_pca"]) and entry["fvu"] >= entry["fvu_pca"]
        ]
        if worse:
            found.append(
                f"{plan.config.out}: no better than PCA at layers {format_ranges(worse)}: give "
                f"more --epochs, more latents (-R) or another --lr"
            )
    return found


def is_useless(metrics: Mapping[str, Any] | None) -> bool:
    """True where at every layer its mean reconstructs the held-out rows as well as the SAE."""
    if metrics is None:
        return False
    layers = [entry["fvu"] for entry in metrics[POSITION_0_OUT]["layers"]]
    known = [fvu for fvu in layers if fvu is not None]
    return bool(known) and all(fvu >= 1 for fvu in known)


def in_units_of_log(plan: RunPlan, metrics: Mapping[str, Any] | None) -> list[float | None] | None:
    """FVU of the held-out rows by layer as the log has that of the batches; None without any."""
    if metrics is None:
        return None
    name = "fvu" if plan.config.loss_space == "raw" else "fvu_standardized"
    return [entry[name] for entry in metrics[POSITION_0_OUT]["layers"]]


def sweep_entry(plan: RunPlan, training: Mapping[str, Any] | str) -> dict[str, Any]:
    """An SAE's line of summary.json.

    Args:
        plan: plan of the SAE.
        training: content of training.json, or the reason why there is none.
    """
    entry: dict[str, Any] = {
        "name": plan.name,
        "layers": list(plan.layers),
        "num_latents": plan.sae.num_latents,
        "k": plan.sae.to_dict().get("k"),
        "lr": plan.schedule.peak,
        "seed": plan.config.seed,
    }
    if isinstance(training, str):
        return {**entry, "diverged": training}
    metrics = training["metrics"]
    if metrics is None:
        seen = training["training"]
        means = {
            "fvu": None,
            "fvu_pca": None,
            "fvu_by_layer": None,
            "l0": seen["l0"],
            "dead_fraction": None,
        }
        return {**entry, **means, "training_fvu": seen["fvu"]}
    outside = metrics[POSITION_0_OUT]
    by_layer = [layer["fvu"] for layer in outside["layers"]]
    return {
        **entry,
        "fvu": _mean(by_layer),
        "fvu_pca": _mean([layer["fvu_pca"] for layer in outside["layers"]]),
        "fvu_by_layer": by_layer,
        "l0": _mean([layer["l0"] for layer in outside["layers"]]),
        "dead_fraction": outside["dead_fraction"],
        "training_fvu": training["training"]["fvu"],
    }


def format_sweep(entries: Sequence[Mapping[str, Any]]) -> str:
    """The SAEs of a sweep, for people: validation rows, means over layers.

    Where SAEs have other layers, each line names them: a mean over one layer says nothing beside a
    mean over all.
    """
    width = max(4, *(len(entry["name"]) for entry in entries))
    layers = [format_ranges(entry["layers"]) for entry in entries]
    column = max(6, *map(len, layers)) + 2 if len(set(layers)) > 1 else 0
    lines = [
        f"{'SAE':<{width}}{'layers' if column else '':>{column}}  latents      k      lr      FVU"
        "      PCA     L0    dead"
    ]
    for entry, of in zip(entries, layers, strict=True):
        start = f"{entry['name']:<{width}}{of if column else '':>{column}}"
        start += f"  {entry['num_latents']:>7} {entry['k'] or '-':>6}"
        start += f" {entry['lr']:>7.2g}"
        if "diverged" in entry:
            lines.append(f"{start}  diverged")
            continue
        dead = entry["dead_fraction"]
        shown = "none" if dead is None else f"{dead:.2%}"
        fvu, pca, l0 = (_number(entry[name]) for name in ("fvu", "fvu_pca", "l0"))
        lines.append(f"{start} {fvu:>8} {pca:>8} {l0:>6} {shown:>7}")
    lines.append("validation rows, means over layers, position 0 out")
    if column:
        lines.append("compare SAEs of other layers layer by layer: fvu_by_layer in summary.json")
    return "\n".join(lines)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}" if value < 1 else f"{value:.2f}"
