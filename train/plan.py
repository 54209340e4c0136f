"""From what was asked for and what the store holds to what a run does: every default resolved."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.sae import SAEConfig
from mlsae.store import AnyStore
from mlsae.store.split import validation_of
from mlsae.train.auxiliary import default_k_aux
from mlsae.train.config import TrainConfig
from mlsae.train.dead import default_dead_after
from mlsae.train.rows import Mixture
from mlsae.train.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, resolved."""

    config: TrainConfig
    store: AnyStore
    site: str
    layers: tuple[int, ...]
    sae: SAEConfig
    validation: npt.NDArray[np.int64]
    """Ascending indices of the sequences held out."""
    mixture: Mixture
    num_steps: int
    num_rows: int
    """Rows of the run, over layers and epochs."""
    schedule: Schedule
    dead_after: int
    """Rows without use after which a latent is dead."""

    def settings(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON: two runs with equal settings are equal."""
        config = self.config
        return {
            "store_id": self.store.store_id,
            "site": self.site,
            "layers": list(self.layers),
            **self.sae.to_dict(),
            "batch_size": config.batch_size,
            "num_steps": self.num_steps,
            "num_rows": self.num_rows,
            "slice_rows": self.mixture.slice_rows,
            "lr": self.schedule.peak,
            "lr_decay": config.lr_decay,
            "warmup": config.warmup,
            "validation_fraction": config.validation_fraction,
            "skip_positions": config.skip_positions,
            "loss_space": config.loss_space,
            "k_aux": default_k_aux(self.sae.d_in),
            "dead_after": self.dead_after,
            "seed": config.seed,
            "precision": config.precision,
        }


def make_plan(config: TrainConfig, store: AnyStore) -> Plan:
    """Resolve a configuration.

    Raises:
        InputError: it asks for what cannot be, or for what the store does not hold.
    """
    site, layers = _site(config, store), store.check_layers(config.layers)
    sae = SAEConfig(d_in=store.d_model, num_latents=config.latents(store.d_model), k=config.k)
    if config.batch_size < len(layers):
        raise InputError(
            f"--batch-size must be at least the number of layers: got {config.batch_size} rows "
            f"for {len(layers)} layers"
        )
    store.moments(site, config.skip_positions)  # Refuses what skip_positions cannot be.
    validation = validation_of(store, config.validation_fraction, config.seed)
    mixture = Mixture.plan(
        store,
        site,
        layers,
        batch_rows=config.batch_size,
        seed=config.seed,
        skip_positions=config.skip_positions,
        validation=validation,
        window=config.window,
    )
    num_steps = _num_steps(config, mixture)
    epochs, rest = divmod(num_steps, mixture.epoch_steps)
    num_rows = epochs * mixture.epoch_rows + rest * config.batch_size
    return Plan(
        config=config,
        store=store,
        site=site,
        layers=layers,
        sae=sae,
        validation=validation,
        mixture=mixture,
        num_steps=num_steps,
        num_rows=num_rows,
        schedule=Schedule(
            config.peak_lr(sae.num_latents), num_steps, config.warmup, config.lr_decay
        ),
        dead_after=default_dead_after(len(layers), num_rows),
    )


def _site(config: TrainConfig, store: AnyStore) -> str:
    if config.site is None and len(store.sites) > 1:
        raise InputError(
            f"{store.place} holds the sites {', '.join(store.sites)}, and an SAE is trained on "
            f"one: choose it with --site"
        )
    return store.check_site(config.site)


def _num_steps(config: TrainConfig, mixture: Mixture) -> int:
    if config.max_rows is None:
        return (config.epochs or 1) * mixture.epoch_steps
    epochs, rest = divmod(config.max_rows, mixture.epoch_rows)
    return epochs * mixture.epoch_steps + -(-rest // config.batch_size)
