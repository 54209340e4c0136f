"""One step of training, on one or several ranks.

Gradients of the pieces of a batch → AuxK → sum over ranks → Adam and unit decoder rows → dead
latents drawn anew, where the objective asks for it.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator

from mlsae.base.errors import MlsaeError
from mlsae.sae import SAE
from mlsae.train.data.decode import RowDecoder
from mlsae.train.data.loader import Batch
from mlsae.train.step.dead import DeadLatents
from mlsae.train.step.objective import Losses, Objective
from mlsae.train.step.optimizer import Optimizer
from mlsae.train.step.resample import resample
from mlsae.train.step.schedule import Schedule


class DivergedError(MlsaeError, ArithmeticError):
    """The loss is no longer a finite number.

    Args:
        loss: value of the loss.
        step: step of that loss, counted from 0.
        lr: learning rate of that step.
        layers: layers whose errors are not finite, by number; by index from the trainer.
    """

    def __init__(self, loss: float, step: int, lr: float, layers: Sequence[int]) -> None:
        self.loss, self.step, self.lr, self.layers = loss, step, lr, tuple(layers)
        where = "AuxK"
        if self.layers:
            where = f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
        super().__init__(
            f"the loss is {loss} at step {step} with learning rate {lr:.3g}, from {where}: "
            f"training has diverged; train again into another --out with a lower --lr"
        )


class StepResult(NamedTuple):
    """Measurements of a step, over all ranks."""

    loss: float
    """Reconstruction and penalty plus AuxK."""
    aux: float
    """AuxK, coefficient included."""
    layer_errors: torch.Tensor
    """(L,) float64 on the CPU: Σ ‖u − û‖² / V_l over rows of each layer."""
    layer_rows: torch.Tensor
    """(L,) float64 on the CPU: rows of each layer."""
    num_active: float
    """Number of values that are not 0."""
    num_dead: int
    """Dead latents before the step."""
    penalty: float = 0.0
    """Penalty on latents, λ included."""
    nested: torch.Tensor | None = None
    """(2, G, L) float64 on the CPU: for each prefix of latents and layer, the same errors and the
    number of values that are not 0."""


class Trainer:
    """The SAE, its optimiser and its dead latents, and how a batch changes them.

    Args:
        sae: on the accelerator's device.
        objective: the loss.
        schedule: learning rates.
        dead: the dead latents.
        accelerator: ranks, and their sums.
        micro_batch: rows whose activations are in memory at once; None for a rank's whole share.
        decode: decoder of the store's rows; None where batches hold floats.
        max_norm: largest L2 norm of a step's gradient; None for any.
    """

    def __init__(
        self,
        sae: SAE,
        objective: Objective,
        schedule: Schedule,
        dead: DeadLatents,
        accelerator: Accelerator,
        micro_batch: int | None = None,
        decode: RowDecoder | None = None,
        max_norm: float | None = None,
    ) -> None:
        self.sae = sae
        self.dead = dead
        self.schedule = schedule
        self.step_number = 0
        """Steps done."""
        self.optimizer = Optimizer(sae, max_norm)
        self.objective = objective
        self._decode = decode
        self._accelerator = accelerator
        self._micro_batch = micro_batch

    def step(self, batch: Batch) -> StepResult:
        """Train on one batch.

        Raises:
            DivergedError: the loss is not finite; the SAE is as it was before the step.
        """
        sae = self.sae
        dead = self.dead.indices()
        has_dead = len(dead) > 0
        resampling = self.objective.resampling
        resamples = has_dead and resampling is not None and resampling.due(self.step_number)
        for parameter in sae.parameters():
            parameter.grad = None
        pieces = [
            self._piece(batch.part(rows), groups, has_dead, len(dead) if resamples else 0)
            for rows, groups in self._cuts(batch)
        ]
        residuals = [piece.residual for piece in pieces if piece.residual is not None]
        aux = pieces[0].main.new_zeros(())
        if residuals:
            aux = self.objective.accumulate_auxiliary(residuals, dead, self._sum)
        counted = sum(
            torch.cat(
                [
                    # Counts over 2²⁴ are no float32.
                    torch.stack([part.double() for part in piece[:2]]),
                    piece.num_active.double()[None],
                    piece.layer_rows.double(),
                    piece.nested.double().reshape(-1),
                ]
            )
            for piece in pieces
        )
        assert isinstance(counted, torch.Tensor)
        num_layers = len(pieces[0].layer_rows)
        fired = torch.stack([piece.fired for piece in pieces]).amax(dim=0)
        counted, fired = self._sum_step(torch.cat([aux.double()[None], counted]), fired)
        counted = counted.cpu()
        aux_sum, main, penalty, num_active = counted[:4].tolist()
        by_layer = counted[4:]
        rows, nested = by_layer[:num_layers], by_layer[num_layers:].view(2, -1, num_layers)
        loss, lr = main + aux_sum, self.schedule(self.step_number)
        if not loss < float("inf"):
            sums = nested[0].sum(dim=0).tolist()
            layers = [i for i, errors in enumerate(sums) if not errors < float("inf")]
            raise DivergedError(loss, self.step_number, lr, layers)
        self.optimizer.step(lr)
        self.dead.update(fired, batch.num_rows)
        if self.objective.extra is not None:
            self.objective.extra.after_step(num_active / batch.num_rows)
        if resamples:
            self._resample(pieces, dead)
        self.step_number += 1
        return StepResult(
            loss, aux_sum, nested[0, -1], rows, num_active, len(dead), penalty, nested
        )

    def _cuts(self, batch: Batch) -> list[tuple[slice | torch.Tensor, tuple[int, ...]]]:
        """This rank's share in pieces of `micro_batch` rows; a share without rows is one piece.

        Where latents are selected by group, a piece has whole groups: the rows of some lanes, which
        are the same whatever the number of ranks. With the pieces come the sizes of their groups.
        """
        num_rows = len(batch.layer)
        size = self._micro_batch or max(num_rows, 1)
        size = min(size, self.objective.most_rows or size)
        if not self.objective.takes_groups:
            return [(slice(start, start + size), ()) for start in range(0, max(num_rows, 1), size)]
        if batch.lane is None:
            return [(slice(None), (num_rows,))]
        order = torch.argsort(batch.lane, stable=True)
        sizes = [n for n in torch.bincount(batch.lane).tolist() if n]
        found: list[tuple[slice | torch.Tensor, tuple[int, ...]]] = []
        start = 0
        while sizes or not found:
            ends = itertools.accumulate(sizes)
            count = max(1, sum(end <= size for end in ends))
            groups, sizes = tuple(sizes[:count]), sizes[count:]
            found.append((order[start : start + sum(groups)], groups))
            start += sum(groups)
        return found

    def _piece(
        self, batch: Batch, groups: tuple[int, ...], has_dead: bool, num_candidates: int
    ) -> Losses:
        device = self.sae.b.device
        layer = batch.layer.to(device)
        if self._decode is None:
            x = batch.x.to(device)
        else:
            x = self._decode((batch.x, *batch.more), layer, batch.origin)
        return self.objective.accumulate(
            x,
            layer,
            batch.num_rows,
            self.step_number if has_dead and self.objective.has_auxiliary else None,
            step=self.step_number,
            num_candidates=num_candidates,
            groups=groups,
        )

    def _resample(self, pieces: Sequence[Losses], dead: torch.Tensor) -> None:
        drawn = resample(
            self.sae,
            self.optimizer,
            dead,
            [piece.candidates for piece in pieces if piece.candidates is not None],
            self._accelerator.process_index,
            self._accelerator.num_processes,
            self._sum,
        )
        self.dead.revive(drawn)

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._accelerator.num_processes == 1:
            return tensor
        total: torch.Tensor = self._accelerator.reduce(tensor, "sum")
        return total

    def _sum_step(
        self, counted: torch.Tensor, fired: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add gradients and counts up over ranks; the loss is a sum over rows, so it is no mean."""
        if self._accelerator.num_processes == 1:
            return counted, fired
        for parameter in self.sae.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                parameter.grad = self._sum(parameter.grad)
        return self._sum(counted), self._sum(fired)
