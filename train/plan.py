"""A run's plan, from its settings and the store: every default resolved."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.base.settings import deciding, described
from mlsae.base.units import counted
from mlsae.sae import SAEConfig
from mlsae.sae.architectures import get, registered
from mlsae.store import AnyStore
from mlsae.store.read.split import validation_of
from mlsae.train.config import TrainConfig
from mlsae.train.data.mixture import Mixture
from mlsae.train.data.rows import TrainingRows
from mlsae.train.data.sampler import NUM_LANES
from mlsae.train.initial import (
    layer_factors,
    of_sae,
    resample_every,
    sae_config,
    with_epsilon,
)
from mlsae.train.step.auxiliary import default_k_aux
from mlsae.train.step.dead import default_dead_after
from mlsae.train.step.schedule import Schedule
from mlsae.train.sweep import Sweep

_RESOLVED = {
    "cache": "store_id",
    "expansion_factor": "num_latents",
    "epochs": "num_steps",
    "max_rows": "num_steps",
    "window": "slice_rows",
    "matryoshka": "matryoshka_widths",
}
"""Setting → the word of `RunPlan.settings` that it is resolved to, where that has another name."""
_AT_DEFAULT = frozenset(
    {
        "clip_grad_norm",
        "loss_space",
        "precision",
        "schedule",
        "seed",
        "skip_positions",
        "warmup",
    }
)
"""Settings that records have had from the first on, at their defaults too."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run, resolved."""

    config: TrainConfig
    name: str
    """The SAE's name in its run; empty where there is no other."""
    store: AnyStore
    site: str
    layers: tuple[int, ...]
    """Layers whose rows the SAE sees: those of the mixture, or one of them."""
    sae: SAEConfig
    validation: npt.NDArray[np.int64]
    """Ascending indices of held-out sequences."""
    validation_fraction: float
    """Share of the sequences that they are."""
    mixture: Mixture
    """The run's rows, which other SAEs may share."""
    num_steps: int
    num_rows: int
    """Rows that the SAE sees, over layers and epochs."""
    schedule: Schedule
    dead_after: int
    """Rows without use after which a latent is dead."""

    @property
    def only(self) -> int | None:
        """Index into the mixture's layers of the one that the SAE sees; None for all."""
        if self.layers == self.mixture.layers:
            return None
        return self.mixture.layers.index(self.layers[0])

    def batch_rows(self, step: int) -> int:
        """Rows that the SAE sees in a step's batch, over ranks."""
        first = step % self.mixture.epoch_steps * self.mixture.batch_rows
        stop = min(first + self.mixture.batch_rows, self.mixture.epoch_rows)
        return self._rows_before(stop) - self._rows_before(first)

    def rows_until(self, step: int) -> int:
        """Rows that the SAE sees in so many first steps."""
        epochs, rest = divmod(step, self.mixture.epoch_steps)
        whole = epochs * self.mixture.num_rows * len(self.layers)
        return whole + self._rows_before(rest * self.mixture.batch_rows)

    def _rows_before(self, item: int) -> int:
        """Rows that the SAE sees among so many first items in an epoch: layers take turns there."""
        if self.only is None:
            return item
        return max(0, -((self.only - item) // len(self.mixture.layers)))

    def settings(self) -> dict[str, Any]:
        """The run's identity, as JSON: two runs with equal settings have equal results.

        Every setting that is marked as deciding is in it, resolved or as given; a value of no
        earlier version is left out at its default, so that runs of earlier versions go on.
        """
        config, kind = self.config, get(self.config.architecture)
        found = {
            "store_id": self.store.store_id,
            "site": self.site,
            **self.sae.to_dict(),
            "layers": list(self.layers),
            "num_steps": self.num_steps,
            "num_rows": self.num_rows,
            "batch_size": self.mixture.batch_rows,
            "validation_fraction": self.validation_fraction,
            "slice_rows": self.mixture.slice_rows,
            "lr": self.schedule.peak,
            "lr_decay": config.decay,
            "k_aux": default_k_aux(self.sae.d_in),
            "dead_after": self.dead_after,
            "data_seed": config.order_seed,
        }
        if self.only is not None:
            found["batch_layers"] = list(self.mixture.layers)
        if kind.revival == "resample":
            found["resample_every"] = resample_every(config, self.num_steps)
        own = {*described(kind.settings)}
        others = {name for one in registered() for name in described(one.settings)} - own
        for name in deciding(type(config)):
            value = getattr(config, name)
            is_default = value == config.__dataclass_fields__[name].default
            has_always = name in _AT_DEFAULT or (name in own and value is not None)
            if {name, _RESOLVED.get(name)} & found.keys() or name in others:
                continue
            if has_always or not is_default:
                found[name] = list(value) if isinstance(value, tuple) else value
        return found


def make_plan(config: TrainConfig, store: AnyStore) -> RunPlan:
    """Resolve one SAE's configuration.

    Raises:
        InputError: the configuration asks for something impossible, or absent from the store.
    """
    return make_plans(Sweep(config=config), store)[0]


def make_plans(sweep: Sweep, store: AnyStore) -> list[RunPlan]:
    """Resolve the configurations for SAEs that are trained in one pass; they share its mixture.

    Raises:
        InputError: an SAE asks for something impossible, or absent from the store.
    """
    config = sweep.config
    site, layers = _site(config, store), store.check_layers(config.layers)
    members = sweep.saes(layers)
    saes = [
        sae_config(m.config, store.d_model, layers if m.layer is None else (m.layer,))
        for m in members
    ]
    # Refuses impossible values of skip_positions.
    moments = store.moments(site, config.skip_positions)
    seed = members[0].config.order_seed
    fraction = config.held_out_fraction(store.num_sequences)
    validation = validation_of(store, fraction, seed)
    mixture = Mixture.plan(
        store,
        site,
        layers,
        batch_rows=_batch_rows(config, store, layers, validation),
        seed=seed,
        skip_positions=config.skip_positions,
        validation=validation,
        window=config.window,
    )
    num_steps = _num_steps(config, mixture)
    plans = []
    for member, sae in zip(members, saes, strict=True):
        own = layers if member.layer is None else (member.layer,)
        if member.config.preset is None:
            sae = with_epsilon(sae, moments, own)
        plan = RunPlan(
            config=of_sae(member.config, layers, own),
            name=member.name,
            store=store,
            site=site,
            layers=own,
            sae=sae,
            validation=validation,
            validation_fraction=fraction,
            mixture=mixture,
            num_steps=num_steps,
            num_rows=0,
            schedule=_schedule(member.config, sae, num_steps),
            dead_after=1,
        )
        layer_factors(sae, moments, own)  # Refuses impossible layer scales.
        _check_groups(plan)
        rows = plan.rows_until(num_steps)
        dead_after = default_dead_after(len(own), rows)
        if every := resample_every(member.config, num_steps):
            # As published: unused for half the time between resamplings.
            dead_after = max(1, plan.rows_until(every) // 2)
        plans.append(replace(plan, num_rows=rows, dead_after=dead_after))
    return plans


def _check_groups(plan: RunPlan) -> None:
    """Refuse a run in which rows cannot share latents, or no threshold can be found afterwards."""
    architecture, config, mixture = plan.sae.architecture, plan.config, plan.mixture
    kind = f"--architecture {architecture.name}"
    if architecture.selects_by_group:
        lanes = range(NUM_LANES)
        group_rows = max(mixture.rank_rows(lane, NUM_LANES) for lane in lanes)
        if mixture.batch_rows < 2 * NUM_LANES:
            raise InputError(
                f"{kind} shares latents among the rows of a group, {NUM_LANES} of them in a batch: "
                f"got {counted(mixture.batch_rows, 'row')} for them all; raise --batch-size"
            )
        if config.micro_batch is not None and config.micro_batch < group_rows:
            raise InputError(
                f"--micro-batch must hold a group of {kind}, {counted(group_rows, 'row')} of the "
                f"{mixture.batch_rows} in a batch, got {config.micro_batch}: raise it, or lower "
                f"--batch-size"
            )
    if architecture.calibrated_l0 is not None and not _holds_out_rows(plan):
        raise InputError(
            f"{kind} takes its threshold from rows held out, and there are none: raise "
            f"--validation-fraction"
        )


def _holds_out_rows(plan: RunPlan) -> bool:
    """True where a sequence held out has a row that counts, position 0 out."""
    store, first = plan.store, max(1, plan.config.skip_positions)
    starts = plan.validation * store.rows_per_sequence
    return any(
        store.eligible(first, start, start + store.rows_per_sequence).any()
        for start in starts.tolist()
    )


def _schedule(config: TrainConfig, sae: SAEConfig, num_steps: int) -> Schedule:
    return Schedule(
        config.peak_lr(sae.num_latents, sae.d_in, num_steps),
        num_steps,
        config.warmup,
        config.decay,
        config.schedule,
    )


def _site(config: TrainConfig, store: AnyStore) -> str:
    if config.site is None and len(store.sites) > 1:
        raise InputError(
            f"{store.place} holds the sites {', '.join(store.sites)}, and an SAE is trained on "
            f"one: choose it with --site"
        )
    return store.check_site(config.site)


def _batch_rows(
    config: TrainConfig, store: AnyStore, layers: tuple[int, ...], validation: npt.NDArray[np.int64]
) -> int:
    if config.batch_size is None:
        rows = TrainingRows(store, config.skip_positions, validation).count()
        return max(len(layers), config.batch_rows(rows * len(layers)))
    if config.batch_size < len(layers):
        raise InputError(
            f"--batch-size must be at least the number of layers: got "
            f"{counted(config.batch_size, 'row')} for {counted(len(layers), 'layer')}"
        )
    return config.batch_size


def _num_steps(config: TrainConfig, mixture: Mixture) -> int:
    if config.max_rows is None:
        return (config.epochs or 1) * mixture.epoch_steps
    epochs, rest = divmod(config.max_rows, mixture.epoch_rows)
    return epochs * mixture.epoch_steps + -(-rest // mixture.batch_rows)
