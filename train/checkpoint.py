"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is `step-N.safetensors` and, written after it, `step-N.json` with its hash. One without
its JSON was never finished and does not count.
"""

import os
import re
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
from mlsae.train.trainer import Trainer

KEPT = 2
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class DamagedCheckpointError(InputError):
    """A checkpoint does not hold the bytes that were written."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run.

    Args:
        directory: holds nothing else.
    """

    directory: Path

    def save(self, trainer: Trainer) -> None:
        """Write the state after the last step durably, and remove all but the last two.

        Raises:
            ResourceError: the disk is full; earlier checkpoints are as they were.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        fsync_directory(self.directory.parent)
        name = f"step-{trainer.step_number:010d}"
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
            "tensors_sha256": digest,
        }
        write_durably(self.directory / f"{name}.json", seal(record))
        kept = {record.stem for record in self._complete()[-KEPT:]}
        for path in sorted(self.directory.iterdir()):  # A record goes before its tensors.
            if path.stem not in kept:
                path.unlink()

    def restore(self, trainer: Trainer) -> bool:
        """Put the last checkpoint's state into a fresh trainer; False if there is none.

        Raises:
            DamagedCheckpointError: its bytes are not those that were written.
        """
        complete = self._complete()
        if not complete:
            return False
        record_path = complete[-1]
        tensors = record_path.with_suffix(".safetensors")
        try:
            record = read_sealed(record_path)
            intact = tensors.exists() and sha256_file(tensors) == record["tensors_sha256"]
        except DamagedFileError:
            intact = False
        if not intact:
            earlier = f"the one before it, {complete[-2].stem}," if complete[1:] else "the start"
            raise DamagedCheckpointError(
                f"the checkpoint {tensors} is damaged: delete it and {record_path.name} to resume "
                f"from {earlier} instead"
            )
        _restore(trainer, safetensors.torch.load_file(tensors), record)
        return True

    def remove(self) -> None:
        """Delete all checkpoints: the run is finished."""
        if self.directory.exists():
            for path in self.directory.iterdir():
                path.unlink()
            self.directory.rmdir()

    def _complete(self) -> list[Path]:
        return sorted(self.directory.glob("step-*.json"))


def _write(state: dict[str, torch.Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file(state, path)
    except safetensors.SafetensorError as error:
        # It tells what the system said in words alone.
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = {"last_used": trainer.dead.last_used}
    for name, parameter in trainer.sae.named_parameters():
        state[f"sae.{name}"] = parameter.detach()
        for moment in _MOMENTS:
            state[f"adam.{name}.{moment}"] = trainer.optimizer.state[parameter][moment]
    return {name: tensor.cpu().contiguous() for name, tensor in state.items()}


def _restore(trainer: Trainer, state: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    trainer.step_number = record["step"]
    trainer.dead.num_rows = record["num_rows"]
    trainer.dead.last_used.copy_(state["last_used"])
    with torch.no_grad():
        for name, parameter in trainer.sae.named_parameters():
            parameter.copy_(state[f"sae.{name}"])
            trainer.optimizer.state[parameter] = {
                moment: state[f"adam.{name}.{moment}"].to(parameter.device) for moment in _MOMENTS
            }
