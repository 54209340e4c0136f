"""A training run from its configuration to the SAE directory."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from mlsae import __version__
from mlsae.base.files import read_sealed
from mlsae.base.heap import keep_freed_memory
from mlsae.base.units import format_count
from mlsae.sae import SAE
from mlsae.sae.directory import TRAINING
from mlsae.store import open_corpus
from mlsae.train.checkpoint import Checkpoints
from mlsae.train.config import TrainConfig
from mlsae.train.dead import DeadLatents
from mlsae.train.decode import Decoder
from mlsae.train.devices import make_accelerator
from mlsae.train.evaluate import POSITION_0_IN, POSITION_0_OUT, evaluate
from mlsae.train.loader import Loader
from mlsae.train.log import LINES, Averages, Log, draw_curves, read_log
from mlsae.train.memory import require_training_memory
from mlsae.train.objective import Objective, layer_variances
from mlsae.train.output import CHECKPOINTS, LOG, check_output, claim
from mlsae.train.plan import Plan, make_plan
from mlsae.train.sampler import check_world_size
from mlsae.train.trainer import Trainer

CURVES = "curves.png"


@dataclass(frozen=True)
class TrainResult:
    """What a run made."""

    directory: Path
    """The SAE directory."""
    metrics: Mapping[str, Any] | None
    """The summary of the validation rows; None if no sequence was held out."""


def run(config: TrainConfig) -> TrainResult:
    """Train an SAE from an activation store.

    Under torchrun or `accelerate launch` every process calls this, once; they share each batch.

    Args:
        config: what to do.

    Returns:
        Where the SAE is and how good it is.

    Raises:
        InputError: something asked for cannot be done, or `config.out` holds another run.
        ResourceError: too little memory, or no such device.
        StoreError: the store cannot be read.
        DivergedError: the loss became infinite or no number.
    """
    accelerator = make_accelerator(config.device)
    result = _run(config, accelerator)
    # torch warns of a process group that is still open when the interpreter ends.
    accelerator.end_training()
    return result


def _run(config: TrainConfig, accelerator: Accelerator) -> TrainResult:
    check_world_size(accelerator.num_processes)
    keep_freed_memory()
    if not accelerator.is_local_main_process:
        # Every process reads the stores; what that warns of is said once a machine.
        logging.getLogger("mlsae").setLevel(logging.ERROR)
    store = open_corpus(config.cache, cache_dir=config.cache_dir, cache_bytes=config.cache_size)
    plan = make_plan(config, store)
    settings = plan.settings()
    if check_output(config.out, settings, resume=config.resume):
        _say(accelerator, f"{config.out} is finished already")
        return _result(config.out)
    require_training_memory(plan, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        claim(config.out, settings)
    trainer = _make_trainer(plan, accelerator)
    checkpoints = Checkpoints(config.out / CHECKPOINTS)
    if checkpoints.restore(trainer):
        _say(accelerator, f"resuming after step {trainer.step_number} of {plan.num_steps}")
    seconds = _train(plan, trainer, checkpoints, accelerator)
    _finish(plan, trainer, accelerator, seconds)
    accelerator.wait_for_everyone()
    return _result(config.out)


def _make_trainer(plan: Plan, accelerator: Accelerator) -> Trainer:
    config = plan.config
    moments = plan.store.moments(plan.site, config.skip_positions)
    sae = SAE(plan.sae, torch.Generator().manual_seed(config.seed))
    at = [moments.layers.index(layer) for layer in plan.layers]
    with torch.no_grad():
        # Every layer has equally many eligible rows, so this is the mean over all of them.
        sae.b.copy_(torch.from_numpy(moments.u_mean[at].mean(axis=0)))
    sae.to(accelerator.device)
    objective = Objective(
        sae,
        layer_variances(moments, plan.layers, config.loss_space),
        config.loss_space,
        mixed=config.precision == "bfloat16",
        seed=config.seed,
    )
    dead = DeadLatents(plan.sae.num_latents, plan.dead_after, accelerator.device)
    return Trainer(
        sae,
        objective,
        plan.schedule,
        dead,
        accelerator,
        config.micro_batch,
        Decoder(plan.store, plan.site, plan.layers, accelerator.device),
    )


def _train(
    plan: Plan, trainer: Trainer, checkpoints: Checkpoints, accelerator: Accelerator
) -> float:
    """Run the steps that are left; returns the seconds they took."""
    config, is_main = plan.config, accelerator.is_main_process
    start, averages = trainer.step_number, Averages()
    log = Log(config.out / LOG, start) if is_main else None
    log_every = max(1, plan.num_steps // LINES)
    began = last_checkpoint = time.monotonic()
    rows_before = trainer.dead.num_rows
    with (
        Loader(
            plan.mixture,
            start=start,
            stop=plan.num_steps,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            pin=accelerator.device.type == "cuda",
        ) as loader,
        tqdm(
            total=plan.num_rows,
            initial=rows_before,
            unit="row",
            unit_scale=True,
            desc="train",
            disable=None if is_main else True,
        ) as bar,
    ):
        for batch in loader:
            averages.add(trainer.step(batch))
            bar.update(batch.num_rows)
            step = trainer.step_number
            if step % log_every and step != plan.num_steps:
                continue
            line, now = averages.take(), time.monotonic()
            bar.set_postfix(
                fvu=f"{line['fvu']:.4f}",
                dead=f"{line['num_dead'] / plan.sae.num_latents:.1%}",
                refresh=False,
            )
            if log is not None:
                speed = (trainer.dead.num_rows - rows_before) / (now - began)
                log.write(
                    {
                        "step": step,
                        "rows": trainer.dead.num_rows,
                        "epoch": (step - 1) // plan.mixture.epoch_steps,
                        **line,
                        "lr": plan.schedule(step - 1),
                        "rows_per_second": speed,
                    }
                )
                # At lines of the log alone, so that a resumed log goes on where it stopped.
                if now - last_checkpoint >= config.checkpoint_seconds and step < plan.num_steps:
                    checkpoints.save(trainer)
                    last_checkpoint = now
    return time.monotonic() - began


def _finish(plan: Plan, trainer: Trainer, accelerator: Accelerator, seconds: float) -> None:
    """Evaluate, write the SAE directory, draw the curves and print the summary."""
    config, metrics = plan.config, None
    if len(plan.validation):
        metrics = evaluate(
            trainer.sae,
            plan.store,
            plan.site,
            plan.layers,
            plan.validation,
            skip_positions=config.skip_positions,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            sum_over_ranks=lambda tensor: accelerator.reduce(tensor, "sum"),
        )
    if not accelerator.is_main_process:
        return
    lines = read_log(config.out / LOG)
    draw_curves(lines, plan.layers, config.out / CURVES)
    trainer.sae.save(config.out, _record(plan, trainer, accelerator, metrics, lines[-1], seconds))
    Checkpoints(config.out / CHECKPOINTS).remove()
    click.echo(format_summary(metrics))
    click.echo(f"SAE: {config.out}")


def _record(
    plan: Plan,
    trainer: Trainer,
    accelerator: Accelerator,
    metrics: Mapping[str, Any] | None,
    last_line: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """training.json: how the SAE came about, and what an analysis has to know of it."""
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
                "tokens_sha256": member.plan["tokens_sha256"],
                "num_sequences": member.num_sequences,
            }
            for member in store.stores
        ],
        "model_fingerprint": model.get("fingerprint") if isinstance(model, Mapping) else None,
        "site": plan.site,
        "layers": list(plan.layers),
        "skip_positions": config.skip_positions,
        "validation": {
            "fraction": config.validation_fraction,
            "seed": config.seed,
            "num_sequences": store.num_sequences,
            "num_held_out": len(plan.validation),
        },
        "position": {
            "step": trainer.step_number,
            "rows": trainer.dead.num_rows,
            "epoch_rows": plan.mixture.epoch_rows,
        },
        "training": {key: last_line[key] for key in ("fvu", "fvu_by_layer", "l0", "num_dead")},
        "metrics": metrics,
        "environment": {
            "mlsae": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "device": accelerator.device.type,
            "world_size": accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "last_session_seconds": round(seconds, 3),
        },
    }


def format_summary(metrics: Mapping[str, Any] | None) -> str:
    """The validation rows by layer, for people."""
    if metrics is None:
        return "No sequence was held out: no summary of validation rows."
    outside, inside = metrics[POSITION_0_OUT], metrics[POSITION_0_IN]
    lines = ["layer      FVU   FVU of u     L0   FVU with position 0"]
    for a, b in zip(outside["layers"], inside["layers"], strict=True):
        columns = [_number(v) for v in (a["fvu"], a["fvu_standardized"], a["l0"], b["fvu"])]
        lines.append("{:>5} {:>8} {:>10} {:>6} {:>21}".format(a["layer"], *columns))
    lines.append(
        f"dead: {outside['num_dead']} latents ({outside['dead_fraction']:.2%}) unused by all "
        f"{format_count(outside['num_rows'])} validation rows"
    )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}" if value < 1 else f"{value:.2f}"


def _result(out: Path) -> TrainResult:
    return TrainResult(out, read_sealed(out / TRAINING)["metrics"])


def _say(accelerator: Accelerator, text: str) -> None:
    if accelerator.is_main_process:
        click.echo(text)
