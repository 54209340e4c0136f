"""Settings of a run as a command line has them, and the YAML file that repeats it."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from mlsae.base.errors import without_secrets
from mlsae.base.files import write_durably
from mlsae.base.settings import described
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


def write_run_file(sweep: Sweep, plans: Sequence[RunPlan]) -> None:
    """Write run.yaml to the run's directory: the options that were given, and defaults in comments.

    Defaults stay defaults, so that an option beside the file changes those that follow from it.

    Args:
        sweep: settings of the run.
        plans: plans of its SAEs.
    """
    config, plan = sweep.config, plans[0]
    caches = config.cache if isinstance(config.cache, tuple) else (config.cache,)
    given: dict[str, Any] = {
        "cache": [without_secrets(str(cache)) for cache in caches],
        "out": str(config.out),
    }
    resolved: dict[str, Any] = {
        "site": plan.site,
        "layers": list(plan.mixture.layers),
        "data_seed": plan.config.order_seed,
        "batch_size": plan.mixture.batch_rows,
        "epochs": None if config.max_rows is not None else 1,
    }
    if not {"expansion_factor", "num_latents"} & sweep.axes.keys():
        resolved |= {"num_latents": plan.sae.num_latents, "lr": plan.schedule.peak}
    if not {"schedule", "warmup"} & sweep.axes.keys():
        resolved["lr_decay"] = plan.config.decay
    for name, field in TrainConfig.__dataclass_fields__.items():
        value = getattr(config, name)
        if name in _LEFT_OUT or name in given:
            continue
        if value != field.default:
            given[name] = value
        elif value is not None:
            resolved.setdefault(name, value)
    if sweep.each_layer:
        given["layers"] = [*plan.mixture.layers, EACH]
    given |= {name: list(values) for name, values in sweep.axes.items()}
    defaults = {
        name: value
        for name, value in resolved.items()
        if name not in given and value is not None and described(TrainConfig)[name].on_command_line
    }
    comments = "".join(f"# {line}\n" for line in _yaml(defaults).splitlines())
    text = f"{_yaml(given)}\n# Defaults, as they came out:\n{comments}"
    write_durably(config.out / RUN_FILE, text.encode())


def _yaml(options: Mapping[str, Any]) -> str:
    content = {
        name.replace("_", "-"): list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
    }
    return str(yaml.safe_dump(content, sort_keys=True, allow_unicode=True))
