"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is `step-N.safetensors` and, written after it, `step-N.json` with its hash. One without
its JSON was never finished and does not count.
"""

import os
import re
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from mlsae.base.errors import InputError
from mlsae.base.files import (
    DamagedFileError,
    fsync_directory,
    full_disk_explained,
    read_sealed,
    seal,
    sha256_file,
    write_durably,
)
from mlsae.train.step.trainer import Trainer

_OURS = re.compile(
    r"step-\d{10}\.(?:json|safetensors|partial)(?:\..*\.partial)?"
    # A kill leaves the file under whose name safetensors writes before it renames it.
    r"|\.tmp[A-Za-z0-9]{6}"
)


class DamagedCheckpointError(InputError):
    """A checkpoint does not hold the bytes that were written."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one SAE of a run.

    Args:
        directory: directory of its own; files of others there are left alone.
        keep: number of checkpoints that `prune` leaves.
    """

    directory: Path
    keep: int = 2

    def save(self, trainer: Trainer, progress: Mapping[str, Any] | None = None) -> None:
        """Write the state after the last step durably.

        Args:
            trainer: trainer whose state is kept.
            progress: JSON value that `restore` gives back.

        Raises:
            ResourceError: the disk is full; earlier checkpoints are as they were.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        fsync_directory(self.directory.parent)
        name = _name(trainer.step_number)
        tensors = self.directory / f"{name}.safetensors"
        partial = tensors.with_suffix(".partial")
        try:
            with full_disk_explained(tensors):
                _write(_state(trainer), partial)
                with partial.open("rb") as file:
                    digest = sha256_file(partial)
                    os.fsync(file.fileno())
            partial.rename(tensors)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        fsync_directory(self.directory)
        record = {
            "step": trainer.step_number,
            "num_rows": trainer.dead.num_rows,
            "progress": dict(progress or {}),
            "tensors_sha256": digest,
        }
        if (extra := trainer.objective.extra) is not None and extra.state():
            record["extra_loss"] = extra.state()
        write_durably(self.directory / f"{name}.json", seal(record))

    def prune(self) -> None:
        """Remove all but the last.

        Apart from `save`, because SAEs that share a pass go on from a step that all of them have:
        none may lose its last but one before every other has its last.
        """
        kept = {_name(step) for step in self.steps()[-self.keep :]}
        self._remove_but(kept)

    def steps(self) -> list[int]:
        """Steps after which there is a whole checkpoint, ascending."""
        return sorted(int(path.stem[5:]) for path in self.directory.glob("step-*.json"))

    def restore(self, trainer: Trainer, step: int) -> dict[str, Any]:
        """Put the state after a step into a fresh trainer, and return the `progress` saved with it.

        Raises:
            DamagedCheckpointError: the checkpoint's bytes are not those that were written.
        """
        record_path = self.directory / f"{_name(step)}.json"
        tensors = record_path.with_suffix(".safetensors")
        try:
            record = read_sealed(record_path)
            intact = tensors.exists() and sha256_file(tensors) == record["tensors_sha256"]
        except DamagedFileError:
            intact = False
        if not intact:
            before = [_name(other) for other in self.steps() if other < step]
            earlier = f"the one before it, {before[-1]}," if before else "the start"
            raise DamagedCheckpointError(
                f"the checkpoint {tensors} is damaged: delete it and {record_path.name} to resume "
                f"from {earlier} instead"
            )
        _restore(trainer, safetensors.torch.load_file(tensors), record)
        progress: dict[str, Any] = record["progress"]
        return progress

    def remove(self, after: int | None = None) -> None:
        """Delete the checkpoints after a step, from which the run does not go on; or all."""
        if not self.directory.exists():
            return
        kept = set() if after is None else {_name(s) for s in self.steps() if s <= after}
        self._remove_but(kept)
        if after is None:
            with suppress(OSError):  # Somebody keeps a file of his own there.
                self.directory.rmdir()

    def _remove_but(self, kept: Set[str]) -> None:
        for path in sorted(self.directory.iterdir()):  # A record goes before its tensors.
            if path.stem not in kept and _OURS.fullmatch(path.name):
                path.unlink()


def common_step(saes: Sequence[Checkpoints]) -> int:
    """The last step after which each of some SAEs has a checkpoint; 0 if there is none."""
    return max(set.intersection(*(set(sae.steps()) for sae in saes)), default=0)


def _name(step: int) -> str:
    return f"step-{step:010d}"


def _write(state: dict[str, torch.Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file(state, path)
    except safetensors.SafetensorError as error:
        # The library repeats the system's error in words alone.
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = {"last_used": trainer.dead.last_used}
    for name, parameter in trainer.sae.named_parameters():
        state[f"sae.{name}"] = parameter.detach()
        for moment, value in trainer.optimizer.state.get(parameter, {}).items():
            state[f"adam.{name}.{moment}"] = value
    return {name: tensor.cpu().contiguous() for name, tensor in state.items()}


def _restore(trainer: Trainer, state: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    trainer.step_number = record["step"]
    trainer.dead.num_rows = record["num_rows"]
    if trainer.objective.extra is not None:
        trainer.objective.extra.restore(record.get("extra_loss", {}))
    trainer.dead.last_used.copy_(state["last_used"])
    with torch.no_grad():
        for name, parameter in trainer.sae.named_parameters():
            parameter.copy_(state[f"sae.{name}"])
            for moment in trainer.optimizer.state.get(parameter, {}):
                found = state[f"adam.{name}.{moment}"]
                trainer.optimizer.state[parameter][moment] = found.to(parameter.device)
