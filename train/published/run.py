"""A run of the preset `paper`: whole sequences in the order of the text, one process, one go."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from mlsae.base.directories import held
from mlsae.base.errors import InputError
from mlsae.base.output.console import Progress, say
from mlsae.base.output.drawing import by_product
from mlsae.sae import SAE
from mlsae.store import AnyStore, open_corpus
from mlsae.train.data.overlap import Overlap, measure
from mlsae.train.options import write_run_file
from mlsae.train.plan import RunPlan, make_plans
from mlsae.train.published.step import DEAD_AFTER, LR, MOST_LR, PaperTrainer
from mlsae.train.running.baseline import add_pca, pca_fvu
from mlsae.train.running.devices import make_accelerator
from mlsae.train.running.evaluate import evaluate, not_finite
from mlsae.train.running.log import LINES, Log, draw_curves, read_log
from mlsae.train.running.output import CURVES, LOG, check_output, claim
from mlsae.train.running.record import format_summary, training_record
from mlsae.train.step.trainer import DivergedError
from mlsae.train.sweep import Sweep

_PUBLISHED_LENGTH = 2048
_BATCH_ROWS = 16384


def run_paper(sweep: Sweep) -> Mapping[str, Any] | None:
    """Train one SAE as the published ones were.

    A micro-batch is a sequence at every layer; a step has as many as fit into the batch size.

    Args:
        sweep: a sweep of one SAE.

    Returns:
        Metrics of the validation rows; None without any.

    Raises:
        InputError: the sweep asks for something that the preset lacks.
        DivergedError: the loss became infinite or no number.
    """
    if not sweep.is_single:
        raise InputError("--preset paper trains one SAE a run: give each option one value")
    if sweep.config.resume:
        raise InputError("--preset paper keeps no checkpoints: leave --resume out, and start anew")
    lr = sweep.config.lr or LR
    if lr > MOST_LR:
        raise InputError(f"--preset paper takes a --lr of at most {MOST_LR:.1e}, got {lr:g}")
    accelerator = make_accelerator(sweep.config.device)
    if accelerator.num_processes > 1:
        raise InputError(
            f"--preset paper takes one process, got {accelerator.num_processes}: the published "
            f"code gives every process the same rows, so more of them train no faster"
        )
    plan, order, count = _plan(sweep)
    with held(plan.config.out):
        return _run(sweep, plan, order, count, accelerator)


def _run(
    sweep: Sweep,
    plan: RunPlan,
    order: npt.NDArray[np.int64],
    count: int,
    accelerator: Accelerator,
) -> Mapping[str, Any] | None:
    config = plan.config
    check_output(config.out, plan.settings(), resume=False)
    overlap = measure(plan.store, plan.validation)
    overlap.check()
    overlap.tell()
    claim(config.out, plan.settings())
    write_run_file(sweep, [plan])
    sae = SAE(plan.sae, torch.Generator().manual_seed(config.seed)).to(accelerator.device)
    length = plan.store.rows_per_sequence
    dead_after = max(1, round(DEAD_AFTER * _PUBLISHED_LENGTH / length))
    trainer = PaperTrainer(sae, plan.schedule.peak, dead_after=dead_after)
    log, began = Log(config.out / LOG, 0), time.monotonic()
    log_every = max(1, plan.num_steps // LINES)
    rows = 0
    with Progress("train", plan.num_rows, "row") as progress:
        for step in range(plan.num_steps):
            first = step * count % len(order)
            sequences = order[first : first + count]
            result = trainer.step(_micro_batches(plan, sequences), len(sequences))
            rows += len(sequences) * length * len(plan.layers)
            progress.update(rows - progress.done)
            if (step + 1) % log_every and step + 1 < plan.num_steps:
                continue
            log.write(
                {
                    "step": step + 1,
                    "rows": rows,
                    "epoch": step * count // len(order),
                    "loss": result.loss,
                    "fvu": float(result.fvu_by_layer.mean()),
                    "fvu_by_layer": result.fvu_by_layer.tolist(),
                    "l0": result.l0,
                    "num_dead": trainer.num_dead,
                    "lr": plan.schedule.peak,
                    "rows_per_second": rows / (time.monotonic() - began),
                }
            )
    return _finish(plan, trainer, rows, time.monotonic() - began, overlap)


def _plan(sweep: Sweep) -> tuple[RunPlan, npt.NDArray[np.int64], int]:
    """The run, the sequences of an epoch in their order, and how many make a step."""
    config = sweep.config
    config = replace(
        config,
        batch_size=_BATCH_ROWS if config.batch_size is None else config.batch_size,
        lr=LR if config.lr is None else config.lr,
        schedule="constant",
        lr_decay=None,
        warmup=0.0,
        loss_space="raw",
    )
    store: AnyStore = open_corpus(
        config.cache, cache_dir=config.cache_dir, cache_bytes=config.cache_size
    )
    (plan,) = make_plans(replace(sweep, config=config), store)
    order = np.setdiff1d(np.arange(store.num_sequences), plan.validation)
    sequence_rows = store.rows_per_sequence * len(plan.layers)
    count = max(1, plan.mixture.batch_rows // sequence_rows)
    # Whole steps alone, as in the published code, whose data set is cut to whole batches.
    count = min(count, len(order))
    order = order[: len(order) // count * count]
    num_steps = (config.epochs or 1) * len(order) // count
    if config.max_rows is not None:
        num_steps = -(-config.max_rows // (count * sequence_rows))
    rows = num_steps * count * sequence_rows
    return replace(plan, num_steps=num_steps, num_rows=rows), order, count


def _micro_batches(plan: RunPlan, sequences: npt.NDArray[np.int64]) -> Iterator[torch.Tensor]:
    """(L, T, D) float32 of each sequence, rows with a flag set to 0."""
    store, length = plan.store, plan.store.rows_per_sequence
    for start in (sequences * length).tolist():
        stop = start + length
        rows = [store.read(plan.site, layer, start, stop) for layer in plan.layers]
        x_LTD = torch.from_numpy(np.stack(rows)).float()
        x_LTD[:, torch.from_numpy(store.row_flags(start, stop) != 0)] = 0
        yield x_LTD


def _finish(
    plan: RunPlan, trainer: PaperTrainer, rows: int, seconds: float, overlap: Overlap
) -> Mapping[str, Any] | None:
    config, out, metrics = plan.config, plan.config.out, None
    if len(plan.validation):
        where = (plan.store, plan.site, plan.layers, plan.validation)
        alone: dict[str, Any] = {
            "skip_positions": config.skip_positions,
            "rank": 0,
            "world_size": 1,
            "sum_over_ranks": lambda tensor: tensor,
        }
        metrics = evaluate(trainer.sae, *where, **alone)
        fvu = pca_fvu(*where, device=trainer.sae.b.device, **alone)
        add_pca(metrics, fvu, trainer.sae.architecture.most_active)
    if layers := not_finite(trainer.sae, metrics, plan.layers):
        raise DivergedError(math.nan, trainer.step_number, plan.schedule.peak, layers)
    lines = read_log(out / LOG)
    record = training_record(
        plan,
        trainer.sae,
        trainer.step_number,
        rows,
        metrics,
        lines[-1],
        overlap,
        world_size=1,
        threads=torch.get_num_threads(),
        seconds=seconds,
    )
    trainer.sae.save(out, record)
    with by_product(str(out / CURVES)):
        # The log has FVU by the variance of a batch, another one than that of the held-out rows.
        draw_curves(lines, plan.layers, None, out / CURVES)
    say(format_summary(metrics))
    say(f"SAE: {out}")
    return metrics
