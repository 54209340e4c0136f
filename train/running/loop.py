"""One pass over the rows for all SAEs in a run: each batch is read and decoded once."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator

from mlsae.base.interruption import Interruption
from mlsae.base.output.console import Progress
from mlsae.train.data.decode import RowDecoder
from mlsae.train.data.loader import Batch, Loader
from mlsae.train.data.mixture import Mixture
from mlsae.train.running.log import LINES
from mlsae.train.running.member import Member
from mlsae.train.running.team import Team
from mlsae.train.step.trainer import DivergedError

STOPPING = "stopping after this step, once its checkpoint is written; again to stop at once"


class Done(NamedTuple):
    """End of a pass."""

    step: int
    seconds: float
    was_stopped: bool
    """True if the user stopped the pass; its checkpoints are written."""


class Loop:
    """A run's steps.

    Args:
        members: the SAEs that this process trains, at least one.
        accelerator: this process and its peers.
        decode: decoder for the pass's rows; None where the one SAE decodes, piece by piece.
        team: takes the SAEs' steps.
        shares_rows: peers share each batch; else each has its own SAEs.
    """

    def __init__(
        self,
        members: Sequence[Member],
        accelerator: Accelerator,
        decode: RowDecoder | None,
        team: Team,
        *,
        shares_rows: bool,
    ) -> None:
        self.members = list(members)
        """Members that have neither diverged nor been taken off."""
        self._plan = members[0].plan
        self._accelerator = accelerator
        self._decode = decode
        self._team = team
        self._shares_rows = shares_rows

    def run(self, start: int, interruption: Interruption) -> Done:
        """Take the steps from `start` on, while an SAE is left and the user does not stop it."""
        plan, mixture = self._plan, self._plan.mixture
        log_every = max(1, plan.num_steps // LINES)
        began = last_checkpoint = time.monotonic()
        step, stop = start, False
        with (
            self._loader(start) as loader,
            Progress(
                "train",
                _rows(mixture, plan.num_steps),
                "row",
                done=_rows(mixture, start),
                shown=self._accelerator.is_main_process,
            ) as progress,
            interruption.deferred(STOPPING),
        ):
            for batch in loader:
                self._step(batch)
                step += 1
                progress.update(batch.num_rows)
                now = time.monotonic()
                if step % log_every == 0 or step == plan.num_steps:
                    for member in self.members:
                        member.end_line((step - 1) // mixture.epoch_steps, now - began)
                    progress.note(*_shown(self.members))
                due = now - last_checkpoint >= plan.config.checkpoint_seconds
                stop, due = self._agree(interruption.requested, due and step < plan.num_steps)
                if stop or due:
                    self.save()
                    last_checkpoint = now
                if stop or not self._any_left():
                    break
        return Done(step, time.monotonic() - began, was_stopped=stop)

    def save(self) -> None:
        """Write each SAE's checkpoint, then remove its oldest."""
        for member in self.members:
            member.save()
        if not self._shares_rows:
            self._accelerator.wait_for_everyone()
        for member in self.members:
            member.prune()

    def _loader(self, start: int) -> Loader:
        accelerator, shares = self._accelerator, self._shares_rows
        return Loader(
            self._plan.mixture,
            start=start,
            stop=self._plan.num_steps,
            rank=accelerator.process_index if shares else 0,
            world_size=accelerator.num_processes if shares else 1,
            pin=accelerator.device.type == "cuda",
        )

    def _step(self, batch: Batch) -> None:
        if self._decode is not None:
            layer = batch.layer.to(self._accelerator.device)
            x = self._decode((batch.x, *batch.more), layer, batch.origin)
            batch = Batch(x, layer, batch.num_rows, lane=batch.lane)
        goes_on = self._team.map(lambda member: _try(member, batch), self.members)
        self.members = [m for m, well in zip(self.members, goes_on, strict=True) if well]

    def _agree(self, *said: bool) -> tuple[bool, ...]:
        """True for each of `said` that any rank says, so that all ranks stop at one step."""
        if self._accelerator.num_processes == 1:
            return said
        device = self._accelerator.device
        told = self._accelerator.reduce(torch.tensor(said, dtype=torch.int32, device=device), "sum")
        return tuple(count > 0 for count in told.tolist())

    def _any_left(self) -> bool:
        # Ranks with their own SAEs go on for each other's sake.
        return self._agree(bool(self.members))[0]


def _try(member: Member, batch: Batch) -> bool:
    """Take an SAE's step; False if it has diverged, which its directory then says."""
    try:
        member.step(batch)
    except DivergedError:
        return False
    return True


def _rows(mixture: Mixture, step: int) -> int:
    """Rows in so many first steps."""
    epochs, rest = divmod(step, mixture.epoch_steps)
    return epochs * mixture.epoch_rows + rest * mixture.batch_rows


def _shown(members: Sequence[Member]) -> list[str]:
    """FVU, L0 and dead latents since the last line; for several SAEs from the least on."""
    lines = [(m.last_line, m.plan.sae.num_latents) for m in members if m.last_line is not None]
    columns = {
        "fvu": ([line["fvu"] for line, _ in lines], "{:.4f}"),
        "L0": ([line["l0"] for line, _ in lines], "{:.1f}"),
        "dead": ([line["num_dead"] / latents for line, latents in lines], "{:.1%}"),
    }
    return [
        f"{name} {_range(values, shape)}" for name, (values, shape) in columns.items() if values
    ]


def _range(values: Sequence[float], shape: str) -> str:
    ends = [shape.format(min(values)), shape.format(max(values))]
    return ends[0] if ends[0] == ends[1] else "–".join(ends)
