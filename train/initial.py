"""From a plan and a store's moments to an SAE before its first step, and its objective.

Shape suffixes: L layers, D channels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlsae.base.errors import InputError
from mlsae.base.settings import described
from mlsae.sae import SAE, SAEConfig
from mlsae.sae.architectures import get
from mlsae.sae.architectures.matryoshka import widths
from mlsae.sae.normalize import EPS
from mlsae.store import Moments
from mlsae.train.config import TrainConfig
from mlsae.train.step.objective import Objective, layer_variances
from mlsae.train.step.resample import PUBLISHED_TIMES, Resampling

Float64 = npt.NDArray[np.float64]

_SMALL, _LEAST_LENGTH = 0.01, 0.99
"""Rows of such a spread that standardising them leaves less than this share of their length."""
_FUNCTIONS = {"log": np.log, "sqrt": np.sqrt, "linear": np.positive}


def sae_config(config: TrainConfig, d_in: int, layers: tuple[int, ...]) -> SAEConfig:
    """The SAE that is asked for.

    Args:
        config: the SAE's settings.
        d_in: channels per row.
        layers: layers that the SAE is trained on.

    Raises:
        InputError: there is no such SAE.
    """
    config.check_together()
    kind = get(config.architecture)
    architecture = kind.wanted(config)
    by_layer = config.normalize in ("scale", "center") or config.layer_scale != "none"
    found = SAEConfig(
        d_in=d_in,
        num_latents=config.latents(d_in),
        architecture=architecture,
        normalize=config.normalize,
        encoder_bias=kind.encoder_bias,
        layer_scale=config.layer_scale,
        layers=layers if by_layer or architecture.depends_on_layer else None,
        matryoshka_widths=widths(config.matryoshka, config.latents(d_in)),
    )
    architecture.check_trained(config, found)
    return found


def layer_factors(sae: SAEConfig, moments: Moments, layers: tuple[int, ...]) -> Float64 | None:
    """(L,) factor on each layer's rows; None where the SAE has no such state.

    Raises:
        InputError: a layer's mean norm has no such scale.
    """
    at = [moments.layers.index(layer) for layer in layers]
    if sae.normalize == "scale":
        squares_L = moments.m2[at].sum(axis=1) / moments.count
        squares_L += np.square(moments.mean[at]).sum(axis=1)
        factors: Float64 = np.sqrt(sae.d_in / squares_L)
        return factors
    if sae.layer_scale == "none":
        return None
    norms_L = moments.norm_mean[at]
    least = 1.0 if sae.layer_scale == "log" else 0.0
    for layer, norm in zip(layers, norms_L.tolist(), strict=True):
        if not norm > least:
            raise InputError(
                f"--layer-scale {sae.layer_scale} needs mean norms above {least:g}, and that of "
                f"layer {layer} is {norm:.3g}: take another scale, or leave the layer out with "
                f"--layers"
            )
    scaled_L = _FUNCTIONS[sae.layer_scale](norms_L)
    scales: Float64 = scaled_L.mean() / scaled_L
    return scales


def initial_sae(sae: SAEConfig, moments: Moments, layers: tuple[int, ...], seed: int) -> SAE:
    """The SAE before its first step: random directions, b at the normalised rows' mean.

    Args:
        sae: the SAE's configuration.
        moments: moments of the rows that the SAE is trained on.
        layers: the SAE's layers.
        seed: seed for the directions.

    Raises:
        InputError: as from `layer_factors`.
    """
    made = SAE(sae, torch.Generator().manual_seed(seed))
    at = [moments.layers.index(layer) for layer in layers]
    means_LD = moments.mean[at]
    factors_L = layer_factors(sae, moments, layers)
    with torch.no_grad():
        if made.layer_shift is not None:
            made.layer_shift.copy_(torch.from_numpy(means_LD))
            means_LD = means_LD * 0
        if made.layer_factor is not None and factors_L is not None:
            made.layer_factor.copy_(torch.from_numpy(factors_L))
            means_LD = means_LD * factors_L[:, None]
        if sae.normalize == "standardize":
            means_LD = moments.u_mean[at] * lengths_of_u(sae, moments, layers)[:, None]
        # Every layer has equally many eligible rows, so this is the mean over all.
        made.b.copy_(torch.from_numpy(means_LD.mean(axis=0)))
    return made


def with_epsilon(sae: SAEConfig, moments: Moments, layers: tuple[int, ...]) -> SAEConfig:
    """The SAE with an epsilon far below its rows, where 1e-5 is not.

    u = (x − m) / (s + ε) is shorter than 1 a channel by s / (s + ε), and x̂ = û · s + m has no ε:
    where s is not far above ε, part of every row is lost, whatever the SAE. A smaller ε, by a power
    of two, makes the SAE that of larger rows.

    Args:
        sae: configuration of the SAE.
        moments: moments of the rows that the SAE is trained on.
        layers: layers of the SAE.
    """
    if sae.normalize != "standardize":
        return sae
    spreads = []
    for layer in layers:
        at = moments.layers.index(layer)
        # Rows whose channels are all equal are short, too, but lose nothing.
        is_small = moments.norm_mean[at] < _SMALL * sae.d_in**0.5
        share = float(np.sqrt(squares_of_u(moments, at) / (sae.d_in - 1)))
        if is_small and 0 < share < _LEAST_LENGTH:
            spreads.append(EPS * share / (1 - share))
    return replace(sae, eps=EPS * 2.0 ** np.floor(np.log2(min(spreads)))) if spreads else sae


def squares_of_u(moments: Moments, at: int) -> float:
    """Mean ‖u‖² of a layer's standardised rows, with the store's epsilon of 1e-5."""
    return float(moments.u_m2[at].sum() / moments.count + np.square(moments.u_mean[at]).sum())


def lengths_of_u(sae: SAEConfig, moments: Moments, layers: tuple[int, ...]) -> Float64:
    """(L,) length of the SAE's standardised rows over that in the store's moments.

    1 for the epsilon of both; with a smaller one rows have length √(d − 1), as near as makes no
    difference.
    """
    if sae.eps == EPS:
        return np.ones(len(layers))
    squares = [squares_of_u(moments, moments.layers.index(layer)) for layer in layers]
    lengths: Float64 = np.sqrt((sae.d_in - 1) / np.array(squares))
    return lengths


def unit_of(sae: SAE, moments: Moments, layers: tuple[int, ...]) -> float:
    """√(E‖u‖² / d) over normalised rows, with equal weight for each layer.

    Args:
        sae: the SAE, its state by layer set.
        moments: moments of the rows that the SAE is trained on.
        layers: the SAE's layers.
    """
    if sae.config.normalize == "standardize":
        return 1.0
    at = [moments.layers.index(layer) for layer in layers]
    means_LD = moments.mean[at]
    if sae.layer_shift is not None:
        means_LD = means_LD - sae.layer_shift.double().cpu().numpy()
    squares_L = moments.m2[at].sum(axis=1) / moments.count + np.square(means_LD).sum(axis=1)
    if sae.layer_factor is not None:
        squares_L = squares_L * np.square(sae.layer_factor.double().cpu().numpy())
    return float(np.sqrt(squares_L.mean() / sae.config.d_in))


@torch.no_grad()
def prepare(
    sae: SAE, config: TrainConfig, moments: Moments, layers: tuple[int, ...]
) -> TrainConfig:
    """Set what depends on training settings, and return these as the architecture resolves them.

    Args:
        sae: the SAE before its first step.
        config: the SAE's settings, as from `of_sae`.
        moments: moments of the rows that the SAE is trained on.
        layers: the SAE's layers.
    """
    resolved: TrainConfig = sae.architecture.resolved(
        config, sae.config, unit_of(sae, moments, layers)
    )
    sae.architecture.prepare(sae.weights, resolved)
    return resolved


def resample_every(config: TrainConfig, num_steps: int) -> int:
    """Steps between resamplings; 0 for none."""
    if get(config.architecture).revival != "resample":
        return 0
    if config.resample_every is not None:
        return config.resample_every
    return num_steps // PUBLISHED_TIMES


def of_layers(
    values: Sequence[float] | None, run_layers: tuple[int, ...], layers: tuple[int, ...], flag: str
) -> tuple[float, ...] | None:
    """The values for an SAE's layers among those for its run.

    Raises:
        InputError: there are more or fewer values than layers of the run.
    """
    if values is None:
        return None
    if len(values) != len(run_layers):
        raise InputError(
            f"{flag} takes a number for each layer: got {len(values)} for the layers "
            f"{', '.join(map(str, run_layers))}"
        )
    return tuple(values[run_layers.index(layer)] for layer in layers)


def of_sae(
    config: TrainConfig, run_layers: tuple[int, ...], layers: tuple[int, ...]
) -> TrainConfig:
    """The configuration with the values for an SAE's layers, instead of its run's.

    Raises:
        InputError: as from `of_layers`.
    """
    names = {"layer_weights"} | described(get(config.architecture).settings).keys()
    own: dict[str, Any] = {
        name: of_layers(getattr(config, name), run_layers, layers, one.flag(name))
        for name, one in described(type(config)).items()
        if one.by_layer and name in names
    }
    return replace(config, **own)


def make_objective(
    sae: SAE, config: TrainConfig, moments: Moments, layers: tuple[int, ...], num_steps: int
) -> Objective:
    """The loss that is asked for.

    Args:
        sae: the SAE, on its device.
        config: the SAE's settings, as from `prepare`.
        moments: moments of the rows that the SAE is trained on.
        layers: the SAE's layers.
        num_steps: steps in the run.
    """
    every = resample_every(config, num_steps)
    in_u = config.loss_space != "raw" and config.normalize == "standardize"
    lengths = lengths_of_u(sae.config, moments, layers) if in_u else 1.0
    return Objective(
        sae,
        layer_variances(moments, layers, config.loss_space, config.normalize) * np.square(lengths),
        config.loss_space,
        mixed=config.precision == "bfloat16",
        seed=config.seed,
        layer_weights=config.layer_weights,
        extra=sae.architecture.extra_loss(config, num_steps, sae.b),
        settings=config,
        resampling=Resampling(every, num_steps) if every else None,
    )
