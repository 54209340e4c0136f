"""Log of a run, sent to TensorBoard or Weights & Biases as well.

Both are optional: `pip install 'mlsae[tensorboard]'` or `'mlsae[wandb]'`.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlsae.base.errors import InputError
from mlsae.base.files import write_durably

PROJECT = "mlsae"
_RUN_ID = "wandb-id"
_WITHOUT_LOGIN = ("offline", "disabled", "dryrun")
"""Values of WANDB_MODE for which nobody has to be logged in."""


class Tracker(Protocol):
    """Where lines of the log go besides."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Send a line."""

    def close(self) -> None:
        """Send the rest; nothing is written after it."""


def check_tracker(kind: str) -> None:
    """Check that the library of a tracker is installed.

    Raises:
        InputError: the tracker is not installed, or nobody is logged in.
    """
    try:
        module: Any = importlib.import_module(kind)
    except ModuleNotFoundError:
        raise InputError(
            f"--track {kind} needs {kind}, which is not installed: pip install 'mlsae[{kind}]'"
        ) from None
    if kind != "wandb":
        return
    try:
        if module.setup().settings.mode not in _WITHOUT_LOGIN:
            module.login()
    except module.errors.UsageError as error:
        raise InputError(
            f"--track wandb: nobody is logged in here ({error}): use `wandb login`, or set "
            f"WANDB_MODE=offline and send the log later by `wandb sync`"
        ) from None
    except ValueError as error:
        raise InputError(
            f"--track wandb: its settings cannot be read ({' '.join(str(error).split())}): mend "
            f"the variables WANDB_…"
        ) from None


def open_tracker(
    kind: str, out: Path, name: str, settings: Mapping[str, Any], step: int
) -> Tracker:
    """Begin to track an SAE, or go on after a step.

    Args:
        kind: `tensorboard` or `wandb`.
        out: the SAE's directory.
        name: name of the run.
        settings: settings that decide the result, among them `layers`.
        step: lines of later steps will come again.
    """
    if kind == "tensorboard":
        return _TensorBoard(out, settings["layers"], step)
    return _WeightsAndBiases(out, name, settings, step)


def scalars(line: Mapping[str, Any], layers: Sequence[int]) -> dict[str, float]:
    """The numbers of a line; those by layer under their name and layer: `fvu_by_layer/3`."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, list):
            by_layer = zip(layers, value, strict=True)
            found |= {f"{name}/{layer}": each for layer, each in by_layer if each is not None}
        elif name != "step":
            found[name] = value
    return found


class _TensorBoard:
    def __init__(self, out: Path, layers: Sequence[int], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._layers = layers
        self._writer: Any = SummaryWriter(out / "tensorboard", purge_step=step + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in scalars(line, self._layers).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, out: Path, name: str, settings: Mapping[str, Any], step: int) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._layers: Sequence[int] = settings["layers"]
        run_id = out / _RUN_ID
        goes_on = step > 0 and run_id.is_file()
        self._run = wandb.init(
            project=PROJECT,
            name=name,
            dir=str(out),
            config=dict(settings),
            id=run_id.read_text() if goes_on else None,
            resume="allow" if goes_on else None,
            # The SAEs of a pass are runs side by side.
            reinit="create_new",
        )
        write_durably(run_id, self._run.id.encode())

    def write(self, line: Mapping[str, Any]) -> None:
        self._run.log(scalars(line, self._layers), step=line["step"])

    def close(self) -> None:
        self._run.finish()
