"""Several SAEs from one pass over the rows: the product over some settings' values."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlsae.base.errors import InputError
from mlsae.base.settings import described, flag
from mlsae.train.config import TrainConfig

SUMMARY, SWEEP = "summary.json", "sweep.json"
_SHORT = {"k": "k", "expansion_factor": "R", "num_latents": "N", "lr": "lr", "seed": "seed"}
"""Prefix for a value in a name; for every other setting its flag and a dash."""
_ORDER = (
    "k",
    "expansion_factor",
    "num_latents",
    "lr",
    "seed",
    "loss_space",
    "schedule",
    "lr_decay",
    "warmup",
    "precision",
    "architecture",
    "l1",
    "l1_warmup",
    "resample_every",
    "normalize",
    "layer_scale",
)
"""Order of words in a name, which earlier runs' directories have; new ones follow."""
SWEPT = tuple(
    sorted(
        (name for name, one in described(TrainConfig).items() if one.swept),
        key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER),
    )
)
"""Settings in which SAEs in one pass may differ; the others belong to the pass."""


@dataclass(frozen=True, kw_only=True)
class SweptSAE:
    """One SAE in a sweep, as it was asked for."""

    name: str
    """Directory name, from the values that set it apart; empty where there is no other."""
    config: TrainConfig
    layer: int | None = None
    """The one layer that it is trained on; None for all in the run."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """SAEs that are trained in one pass.

    Raises:
        InputError: a setting is none of an SAE, or a value is given twice.
    """

    config: TrainConfig
    """Settings that they have in common; `out` holds a directory for each."""
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values for fields in `config`: every combination is an SAE."""
    each_layer: bool = False
    """Train each SAE once more for each single layer, on that layer's rows in each batch."""

    def __post_init__(self) -> None:
        for name, values in self.axes.items():
            if name not in SWEPT:
                raise InputError(
                    f"SAEs of one run cannot differ in {name!r}; expected {', '.join(SWEPT)}"
                )
            if not values or len(set(values)) < len(values):
                given = ", ".join(map(str, values))
                raise InputError(
                    f"{flag(TrainConfig, name)} takes each value once, got {given or 'none'}"
                )

    @property
    def is_single(self) -> bool:
        """True for one SAE, whose directory is `out` itself."""
        return not self.each_layer and all(len(values) == 1 for values in self.axes.values())

    def saes(self, layers: tuple[int, ...]) -> list[SweptSAE]:
        """The SAEs, ordered by the values.

        All share the order of rows and the held-out sequences, which follow from
        `data_seed`, or from the first seed without one.

        Args:
            layers: the run's layers.
        """
        seeds = self.axes.get("seed", (self.config.seed,))
        data_seed = self.config.data_seed if self.config.data_seed is not None else seeds[0]
        found = []
        for values in itertools.product(*self.axes.values()):
            chosen = dict(zip(self.axes, values, strict=True))
            words = [
                _words(name, self.axes[name])[chosen[name]]
                for name in self.axes
                if len(self.axes[name]) > 1
            ]
            for layer in (None, *layers) if self.each_layer else (None,):
                last = ["all" if layer is None else f"layer{layer}"] if self.each_layer else []
                name = "-".join([*words, *last])
                out = self.config.out / name
                config = replace(self.config, **chosen, data_seed=data_seed, out=out)
                found.append(SweptSAE(name=name, config=config, layer=layer))
        return found

    def settings(self) -> dict[str, Any]:
        """Values that tell one sweep from another in one directory, as JSON."""
        axes = {name: list(values) for name, values in self.axes.items()}
        return {"axes": axes, "each_layer": self.each_layer}


def _words(name: str, values: tuple[Any, ...]) -> dict[Any, str]:
    """Value → word of a name: six digits of a number, or all where six tell no two apart."""
    prefix = _SHORT.get(name) or f"{flag(TrainConfig, name).removeprefix('--')}-"
    shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    if len(set(shown)) < len(values):
        shown = [str(value) for value in values]
    return {value: f"{prefix}{text}" for value, text in zip(values, shown, strict=True)}
