"""One SAE of a pass, with its log and its checkpoints."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from mlsae.base.files import read_sealed, seal, write_durably
from mlsae.sae.directory import CONFIG
from mlsae.train.data.decode import RowDecoder
from mlsae.train.data.loader import Batch
from mlsae.train.initial import initial_sae, make_objective, prepare
from mlsae.train.plan import RunPlan
from mlsae.train.running.checkpoint import Checkpoints
from mlsae.train.running.devices import Alone
from mlsae.train.running.evaluate import POSITION_0_OUT, not_finite
from mlsae.train.running.log import Averages, Log
from mlsae.train.running.output import CHECKPOINTS, DIVERGED, LOG
from mlsae.train.running.tracking import Tracker, open_tracker
from mlsae.train.step.dead import DeadLatents
from mlsae.train.step.trainer import DivergedError, Trainer


class Member:
    """An SAE in training.

    Args:
        plan: plan of the SAE.
        ranks: processes that share its batches.
        decode: decoder of the store's rows; None where batches hold floats.
        writes: True for the process that keeps its log and its checkpoints.
    """

    def __init__(
        self, plan: RunPlan, ranks: Accelerator | Alone, decode: RowDecoder | None, *, writes: bool
    ) -> None:
        self.plan = plan
        self.ranks = ranks
        self.trainer = _make_trainer(plan, ranks, decode)
        self.sae = self.trainer.sae
        """The SAE; after `keep` in the form that is measured and kept."""
        self.record: dict[str, Any] = {}
        """Entries of training.json that come with that form."""
        self.checkpoints = Checkpoints(plan.config.out / CHECKPOINTS, plan.config.keep)
        self.writes = writes
        self.last_line: dict[str, Any] | None = None
        """Last line of the log."""
        self._averages = Averages()
        self._log: Log | None = None
        self._tracker: Tracker | None = None
        self._rows_before = 0

    def begin(self, step: int) -> None:
        """Go on after a step that there is a checkpoint of, or begin with step 0.

        Raises:
            DamagedCheckpointError: that checkpoint is damaged.
        """
        if step:
            self._averages.restore(self.checkpoints.restore(self.trainer, step))
        self._rows_before = self.trainer.dead.num_rows
        if self.writes:
            self.checkpoints.remove(after=step)
            config = self.plan.config
            self._log = Log(config.out / LOG, step)
            if config.track is not None:
                name = self.plan.name or config.out.name
                self._tracker = open_tracker(
                    config.track, config.out, name, self.plan.settings(), step
                )

    def close(self) -> None:
        """Send the rest of the log to the tracker."""
        if self._tracker is not None:
            self._tracker.close()

    def step(self, batch: Batch) -> None:
        """Train on the rows of a batch that the SAE sees.

        Raises:
            DivergedError: the loss is not finite; the SAE is as it was before the step. The
                directory has a record of it.
        """
        if (only := self.plan.only) is not None:
            num_rows = self.plan.batch_rows(self.trainer.step_number)
            if num_rows == 0:
                # The short last batch of an epoch may have no row of the layer.
                self.trainer.step_number += 1
                return
            seen = batch.layer == only
            x, lane = batch.x[seen], batch.lane
            if lane is not None:
                lane = lane[seen.to(lane.device)]
            batch = Batch(x, batch.layer.new_zeros(len(x)), num_rows, lane=lane)
        try:
            self._averages.add(self.trainer.step(batch))
        except DivergedError as error:
            self._record(error.loss, error.step, [self.plan.layers[i] for i in error.layers])
            raise

    def keep(self) -> None:
        """Bring the SAE into the form in which it is kept, once it is trained."""
        self.sae, found = self.trainer.sae.kept()
        self.record = _as_json(found)

    def check(self, metrics: Mapping[str, Any] | None) -> bool:
        """True unless the last step made the SAE diverge, which its directory then says.

        Args:
            metrics: figures of the held-out rows; None without any.
        """
        layers = not_finite(self.sae, metrics, self.plan.layers)
        if layers:
            self._record(math.nan, self.trainer.step_number, layers)
        return not layers

    def _record(self, loss: float, step: int, layers: Sequence[int]) -> None:
        if self.writes:
            lr = self.plan.schedule(min(step, self.plan.num_steps - 1))
            record = {"loss": str(loss), "step": step, "lr": lr, "layers": list(layers)}
            write_durably(self.plan.config.out / DIVERGED, seal(record))

    def end_line(self, epoch: int, seconds: float) -> None:
        """Write a line of the log: means over the steps since the last one.

        Args:
            epoch: epoch of the last step, from 0.
            seconds: time since `begin`.
        """
        means = self._averages.take()
        if means is None:
            return
        step, rows = self.trainer.step_number, self.trainer.dead.num_rows
        self.last_line = {
            "step": step,
            "rows": rows,
            "epoch": epoch,
            **means,
            "lr": self.plan.schedule(step - 1),
            "rows_per_second": (rows - self._rows_before) / seconds,
        }
        if self._log is not None:
            self._log.write(self.last_line)
        if self._tracker is not None:
            self._tracker.write(self.last_line)

    def track(self, metrics: Mapping[str, Any] | None) -> None:
        """Send the figures of the held-out rows to the tracker."""
        if self._tracker is None or metrics is None:
            return
        outside = metrics[POSITION_0_OUT]
        line = {"step": self.trainer.step_number, "validation_dead": outside["num_dead"]}
        for name in ("fvu", "fvu_standardized", "fvu_pca", "l0"):
            line[f"validation_{name}_by_layer"] = [entry[name] for entry in outside["layers"]]
        self._tracker.write(line)

    def save(self) -> None:
        """Write a checkpoint after the last step; earlier ones stay until they are pruned."""
        if self._log is not None:
            self._log.sync()
            self.checkpoints.save(self.trainer, self._averages.state())

    def prune(self) -> None:
        """Remove all checkpoints but the last."""
        if self.writes:
            self.checkpoints.prune()


def _as_json(value: Any) -> Any:
    """Tensors as lists; numbers have the digits that tell float32 apart."""
    if isinstance(value, torch.Tensor):
        return [float(f"{number:.9g}") for number in value.detach().cpu().tolist()]
    return {name: _as_json(one) for name, one in value.items()}


def is_finished(plan: RunPlan) -> bool:
    """True where the SAE is there already."""
    return (plan.config.out / CONFIG).is_file()


def divergence(plan: RunPlan) -> DivergedError | None:
    """Error that ended an earlier training of the SAE and would end it again; None without one."""
    try:
        found = read_sealed(plan.config.out / DIVERGED)
    except FileNotFoundError:
        return None
    return DivergedError(float(found["loss"]), found["step"], found["lr"], found["layers"])


def _make_trainer(plan: RunPlan, ranks: Accelerator | Alone, decode: RowDecoder | None) -> Trainer:
    config = plan.config
    moments = plan.store.moments(plan.site, config.skip_positions)
    sae = initial_sae(plan.sae, moments, plan.layers, config.seed).to(ranks.device)
    config = prepare(sae, config, moments, plan.layers)
    objective = make_objective(sae, config, moments, plan.layers, plan.num_steps)
    dead = DeadLatents(plan.sae.num_latents, plan.dead_after, ranks.device)
    return Trainer(
        sae,
        objective,
        plan.schedule,
        dead,
        ranks,
        config.micro_batch,
        decode,
        config.clip_grad_norm,
    )
