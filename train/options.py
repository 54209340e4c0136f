"""Settings of a run as a command line or a YAML file has them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mlsae.base.errors import InputError
from mlsae.base.files import write_durably
from mlsae.train.config import EACH, TrainConfig
from mlsae.train.plan import RunPlan
from mlsae.train.sweep import SWEPT, Sweep

RUN_FILE = "run.yaml"
_LEFT_OUT = frozenset({"resume", "checkpoint_seconds", "cache_dir", "cache_size"})
"""Settings of this machine and this start of the run alone."""


def make_sweep(options: Mapping[str, Any]) -> Sweep:
    """The SAEs that options ask for.

    Args:
        options: fields of `TrainConfig`; those in which SAEs may differ are tuples of values, empty
            where the option was not given, and `layers` is what `parse_training_layers` gives.

    Raises:
        InputError: a value is out of range, given twice, or two exclude each other.
    """
    settings, axes = dict(options), {}
    settings["layers"], each_layer = options["layers"] or (None, False)
    for name in SWEPT:
        values = settings.pop(name)
        if len(values) == 1:
            settings[name] = values[0]
        elif values:
            axes[name] = values
    config = TrainConfig(**settings)
    return Sweep(config=config, axes=axes, each_layer=each_layer)


def read_run_file(path: Path, options: Mapping[str, bool]) -> dict[str, Any]:
    """Read the options in a YAML file, as text, each as if it stood on the command line.

    Args:
        path: YAML file, a mapping from options without dashes to values or lists of values.
        options: names that the file may have, with `_` for `-` → True where one can be repeated.

    Raises:
        InputError: the file is no such YAML.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise InputError(f"--config {path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())
        raise InputError(f"--config {path} is no YAML file: {what}") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {path} must map options to values, such as `batch-size: 4096`")
    found = {str(name).replace("-", "_"): value for name, value in content.items()}
    if unknown := sorted(found.keys() - options.keys()):
        known = ", ".join(sorted(name.replace("_", "-") for name in options))
        raise InputError(
            f"--config {path} gives {unknown[0].replace('_', '-')!r}, which is no option; expected "
            f"{known}"
        )
    return {
        name: _as_given(value, again=options[name])
        for name, value in found.items()
        if value is not None
    }


def write_run_file(sweep: Sweep, plans: Sequence[RunPlan]) -> None:
    """Write run.yaml to the run's directory: the run with every default resolved.

    Args:
        sweep: settings of the run.
        plans: plans of its SAEs.
    """
    config, plan = sweep.config, plans[0]
    caches = config.cache if isinstance(config.cache, tuple) else (config.cache,)
    content: dict[str, Any] = {}
    for name in TrainConfig.__dataclass_fields__:
        value = getattr(config, name)
        if name not in _LEFT_OUT and value is not None:
            content[name] = value
    content |= {
        "cache": [str(cache) for cache in caches],
        "out": str(config.out),
        "site": plan.site,
        "layers": [*plan.mixture.layers, *([EACH] if sweep.each_layer else [])],
        "data_seed": plan.config.order_seed,
        "lr": plan.schedule.peak,
        "num_latents": plan.sae.num_latents,
    }
    if config.max_rows is None:
        content["epochs"] = config.epochs or 1
    content.pop("expansion_factor", None)
    if not {"schedule", "warmup"} & sweep.axes.keys():
        content["lr_decay"] = config.decay
    if {"expansion_factor", "num_latents"} & sweep.axes.keys():
        del content["num_latents"]
        if config.lr is None:
            # The learning rate is another for each number of latents.
            del content["lr"]
    content |= {name: list(values) for name, values in sweep.axes.items()}
    options = {name.replace("_", "-"): value for name, value in content.items()}
    text = yaml.safe_dump(options, sort_keys=True, allow_unicode=True)
    write_durably(config.out / RUN_FILE, text.encode())


def _as_given(value: Any, *, again: bool) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, list):
        words = [str(word) for word in value]
        return words if again else ",".join(words)
    return [str(value)] if again else str(value)
