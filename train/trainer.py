"""One step of training, on one or several ranks.

backward → sum over ranks → remove the gradient along decoder directions → Adam → unit decoder rows.
"""

from typing import NamedTuple

import torch
from accelerate import Accelerator

from mlsae.base.errors import MlsaeError
from mlsae.sae import SAE
from mlsae.train.dead import DeadLatents
from mlsae.train.loader import Batch
from mlsae.train.objective import Objective
from mlsae.train.schedule import Schedule

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 6.25e-10


class DivergedError(MlsaeError, ArithmeticError):
    """The loss is no longer a finite number."""


class StepResult(NamedTuple):
    """What a step saw, over all ranks."""

    loss: float
    """Main term plus AuxK."""
    aux: float
    """AuxK, coefficient included."""
    layer_errors: torch.Tensor
    """(L,) float64 on the CPU: Σ ‖u − û‖² / V_l over rows of each layer."""
    layer_rows: torch.Tensor
    """(L,) float64 on the CPU: rows of each layer."""
    num_active: float
    """Σ over rows of values above 0."""
    num_dead: int
    """Dead latents before the step."""


class Trainer:
    """The SAE, its optimiser and its dead latents, and how a batch changes them.

    Args:
        sae: on the accelerator's device.
        objective: the loss.
        schedule: learning rates.
        dead: the dead latents.
        accelerator: how ranks add up.
    """

    def __init__(
        self,
        sae: SAE,
        objective: Objective,
        schedule: Schedule,
        dead: DeadLatents,
        accelerator: Accelerator,
    ) -> None:
        self.sae = sae
        self.dead = dead
        self.schedule = schedule
        self.step_number = 0
        """Steps done."""
        self.optimizer = torch.optim.Adam(
            sae.parameters(), lr=schedule.peak, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True
        )
        self._objective = objective
        self._accelerator = accelerator

    def step(self, batch: Batch) -> StepResult:
        """Train on one batch.

        Raises:
            DivergedError: the loss is not finite; the SAE is as it was before the step.
        """
        sae, device = self.sae, self.sae.b.device
        dead = self.dead.indices()
        losses = self._objective(
            batch.x.to(device), batch.layer.to(device), batch.num_rows, dead, self._sum
        )
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.main + losses.aux)
        counted = torch.cat(
            [
                torch.stack([losses.main.detach(), losses.aux.detach(), losses.num_active]),
                losses.layer_errors,
                losses.layer_rows,
            ]
        ).double()
        counted, fired = self._sum_step(counted, losses.fired)
        main, aux, num_active, *by_layer = counted.tolist()
        lr = self.schedule(self.step_number)
        if not main + aux < float("inf"):
            raise DivergedError(
                f"the loss is {main + aux} at step {self.step_number} with learning rate {lr:.3g}: "
                f"training has diverged; lower --lr. The last checkpoint is kept"
            )
        self._project_gradient()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        sae.normalize_decoder()
        self.dead.update(fired, batch.num_rows)
        self.step_number += 1
        errors, rows = torch.tensor(by_layer, dtype=torch.float64).view(2, -1)
        return StepResult(main + aux, aux, errors, rows, num_active, len(dead))

    @torch.no_grad()
    def _project_gradient(self) -> None:
        """Remove the part of the decoder's gradient that would only change its rows' lengths."""
        W, grad = self.sae.W_dec, self.sae.W_dec.grad
        assert grad is not None
        along = torch.linalg.vecdot(grad, W)[:, None]
        grad.addcmul_(W, along, value=-1)

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
            assert parameter.grad is not None
            parameter.grad = self._sum(parameter.grad)
        return self._sum(counted), self._sum(fired)
