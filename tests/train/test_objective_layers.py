"""State that depends on the layer: from a store's moments to runs, directories and analyses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlsae.base.errors import InputError
from mlsae.sae import SAE, load
from mlsae.sae.formats.common import ConversionError
from mlsae.sae.formats.convert import export_sae
from mlsae.store import create, open_store
from mlsae.train import TrainConfig, run
from mlsae.train.initial import (
    initial_sae,
    layer_factors,
    of_sae,
    sae_config,
    with_epsilon,
)

LAYERS = (0, 1, 3)
CHANGES: dict[str, dict[str, Any]] = {
    "standardize": {},
    "none": {"normalize": "none"},
    "scale": {"normalize": "scale"},
    "center": {"normalize": "center"},
    "log": {"normalize": "none", "layer_scale": "log"},
    "sqrt": {"normalize": "none", "layer_scale": "sqrt"},
    "linear": {"normalize": "none", "layer_scale": "linear"},
    "relu": {"architecture": "relu", "l1": 0.01},
    "relu, center": {"architecture": "relu", "l1": 0.01, "normalize": "center"},
}


def config(sample: Any, out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "num_latents": 64,
        "k": 4,
        "batch_size": 60,
        "lr": 3e-3,
        "validation_fraction": 0.1,
        "device": "cpu",
    }
    return TrainConfig(cache=sample.path, out=out, **settings | changes)


def eligible_rows(sample: Any, layer: int) -> np.ndarray[Any, Any]:
    store = open_store(sample.path)
    return store.read("resid_post", layer)[store.eligible(1)].astype(np.float64)


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_a_run_of_every_kind(changes: dict[str, Any], sample: Any, tmp_path: Path) -> None:
    """FVU is in the rows' own units, by brute force; read back, the SAE needs its layers."""
    sae = load(run(config(sample, tmp_path / "sae", **changes)).directory)
    assert sae.config.layers == (LAYERS if sae.config.depends_on_layer else None)
    store, record = open_store(sample.path), sae.training_record
    held_out = load_validation(store, record)
    for entry in record["metrics"]["position_0_out"]["layers"]:
        rows = store.read("resid_post", entry["layer"])[held_out].astype(np.float32)
        x = torch.from_numpy(rows)
        with torch.no_grad():
            error = (x - sae(x, entry["layer"])).double().square().sum()
        spread = np.square(rows - rows.mean(0, dtype=np.float64)).sum()
        assert entry["fvu"] == pytest.approx(float(error) / spread, rel=1e-4)


def load_validation(store: Any, record: dict[str, Any]) -> np.ndarray[Any, Any]:
    from mlsae.store.read.split import validation_of

    split = record["validation"]
    sequences = validation_of(store, split["fraction"], split["seed"])
    chosen = np.zeros(store.num_sequences, dtype=bool)
    chosen[sequences] = True
    rows = np.repeat(chosen, store.rows_per_sequence) & store.eligible(1)
    return np.asarray(rows)


@pytest.mark.parametrize("scale", ["log", "sqrt", "linear"])
def test_layer_scales_are_those_of_the_formula(scale: str, sample: Any, tmp_path: Path) -> None:
    """s_l = mean(f(n)) / f(n_l) with the mean norms of eligible rows; u and x̂ as defined."""
    wanted = config(sample, tmp_path / "out", normalize="none", layer_scale=scale)
    moments = open_store(sample.path).moments("resid_post", 1)
    sae_shape = sae_config(wanted, sample_width(sample), LAYERS)
    norms = [np.linalg.norm(eligible_rows(sample, n), axis=1).mean() for n in LAYERS]
    f = {"log": np.log, "sqrt": np.sqrt, "linear": np.asarray}[scale](norms)
    expected = f.mean() / f
    found = layer_factors(sae_shape, moments, LAYERS)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    sae = initial_sae(sae_shape, moments, LAYERS, 0).double()
    x = torch.from_numpy(eligible_rows(sample, 3)[:20])
    pre = (expected[2] * x - sae.b) @ sae.W_enc.T
    at = pre.topk(4, dim=1).indices
    z = torch.zeros_like(pre).scatter(1, at, pre.gather(1, at)).relu()
    torch.testing.assert_close(
        sae(x, 3), (z @ sae.W_dec + sae.b) / expected[2], rtol=1e-5, atol=1e-5
    )


def sample_width(sample: Any) -> int:
    return open_store(sample.path).d_model


def test_scale_and_center_are_of_the_layers_moments(sample: Any, tmp_path: Path) -> None:
    """E‖u‖² = d at each layer; E u = 0. The bias starts at the mean of u."""
    moments, d = open_store(sample.path).moments("resid_post", 1), sample_width(sample)
    for normalize in ("scale", "center"):
        shape = sae_config(config(sample, tmp_path, normalize=normalize), d, LAYERS)
        sae = initial_sae(shape, moments, LAYERS, 0).double()
        means = []
        for at, layer in enumerate(LAYERS):
            u = sae.standardize(torch.from_numpy(eligible_rows(sample, layer)), at).u.numpy()
            means.append(u.mean(0))
            if normalize == "scale":
                np.testing.assert_allclose(np.square(u).sum(1).mean(), d, rtol=1e-5)
            else:
                np.testing.assert_allclose(u.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(sae.b.detach(), np.mean(means, axis=0), atol=1e-4)


def test_the_layer_has_to_be_given(sample: Any, tmp_path: Path) -> None:
    """Missing or another: named. A tensor gives one a row, of any shape that broadcasts."""
    moments = open_store(sample.path).moments("resid_post", 1)
    d = sample_width(sample)
    shape = sae_config(config(sample, tmp_path, normalize="center"), d, LAYERS)
    sae = initial_sae(shape, moments, LAYERS, 0)
    x = torch.randn(3, 5, d)
    message = r"give the layer of the rows, encode\(x, layer\), one of 0, 1, 3"
    for call in (lambda: sae.encode(x), lambda: sae(x), lambda: sae.standardize(x[0])):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(InputError, match="this SAE has layers 0, 1, 3, got 2"):
        sae.encode(x, 2)
    layers = torch.tensor([[3], [0], [1]])
    with pytest.raises(InputError, match="this SAE has layers 0, 1, 3, got 7"):
        sae.encode(x, torch.where(layers == 1, 7, layers))
    together = sae(x, layers)
    for i, layer in enumerate(layers[:, 0].tolist()):
        torch.testing.assert_close(together[i], sae(x[i], layer))
    assert sae.encode(x, layers).mean.shape == (3, 5, d)


def test_log_is_refused_where_a_norm_is_not_above_1(sample: Any, tmp_path: Path) -> None:
    """The layer, its norm and the way out."""
    moments = open_store(sample.path).moments("resid_post", 1)
    shape = sae_config(
        config(sample, tmp_path, normalize="none", layer_scale="log"), sample_width(sample), LAYERS
    )
    norms = moments.norm_mean.copy()
    norms[moments.layers.index(1)] = 0.5
    small = dataclasses.replace(moments, norm_mean=norms)
    message = r"--layer-scale log needs mean norms above 1, and that of layer 1 is 0\.5: take anoth"
    with pytest.raises(InputError, match=message):
        layer_factors(shape, small, LAYERS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "step"}, "or jumprelu or gated, got 'step'"),
        ({"architecture": "gated"}, "--architecture gated needs --l1, the weight of its penalty"),
        ({"target_l0": 8.0}, "--target-l0 belongs to --architecture jumprelu, got topk: leave"),
        (
            {"architecture": "jumprelu", "l1": 0.1},
            "--l1 belongs to --architecture relu or gated, got ju",
        ),
        ({"architecture": "jumprelu", "target_l0": 0.0}, "--target-l0 must be above 0, got 0"),
        (
            {"architecture": "jumprelu", "target_l0": 40.0, "num_latents": 32},
            "--target-l0 must be below the number of latents: got 40 and 32 latents; lower it or",
        ),
        (
            {"architecture": "jumprelu", "num_latents": 32},
            "--target-l0 must be below the number of latents: got 32 and 32 latents; lower it or",
        ),
        (
            {"architecture": "jumprelu", "target_l0": 4.0, "l0_penalty": 0.1},
            "give --target-l0 or --l0-penalty, not both",
        ),
        ({"architecture": "jumprelu", "bandwidth": 0.0}, "--bandwidth must be above 0, got 0"),
        ({"architecture": "jumprelu", "l0_penalty": -1.0}, "--l0-penalty must be at least 0, got"),
        (
            {"architecture": "jumprelu", "initial_threshold": -0.5},
            "--initial-threshold must be at least 0, got -0.5",
        ),
        (
            {"architecture": "jumprelu", "l0_warmup": 2.0},
            "--l0-warmup is a share of the steps from 0 to 1, got 2",
        ),
        (
            {"architecture": "jumprelu", "straight_through": "none"},
            "--straight-through must be threshold or both, got 'none'",
        ),
        ({"architecture": "relu"}, "--architecture relu needs --l1, the weight of its penalty"),
        ({"l1": 0.1}, "--l1 belongs to --architecture relu or gated, got topk: leave"),
        ({"layer_l1": (1.0, 2.0)}, "--layer-l1 belongs to --architecture relu or gated, got topk"),
        ({"architecture": "relu", "l1": -1.0}, "--l1 must be at least 0, got -1"),
        (
            {"architecture": "relu", "l1": 0.1, "precision": "bfloat16"},
            "--precision bfloat16 is for --architecture topk; relu takes float32",
        ),
        (
            {"architecture": "relu", "l1": 0.1, "l1_warmup": 2.0},
            "--l1-warmup is a share of the steps from 0 to 1, got 2",
        ),
        (
            {"architecture": "relu", "l1": 0.1, "resample_every": -1},
            "--resample-every must be at least 0, got -1",
        ),
        ({"normalize": "unit"}, "--normalize must be standardize or none or scale or center"),
        (
            {"layer_scale": "cube"},
            "--layer-scale must be none or log or sqrt or linear, got 'cube'",
        ),
        ({"layer_scale": "log"}, "--layer-scale log takes rows as they are: it needs --normalize"),
        ({"layer_weights": (1.0, -2.0)}, "--layer-weights takes numbers of at least 0, got 1,-2"),
    ],
)
def test_what_cannot_be_asked_for(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The flag, and what would do."""
    with pytest.raises(InputError) as caught:
        sae_config(TrainConfig(cache=tmp_path, out=tmp_path / "out", **changes), 8, LAYERS)
    assert message in str(caught.value)


def test_values_of_layers_are_as_many_as_layers(sample: Any, tmp_path: Path) -> None:
    """A value is given for each layer of the run; the SAE of a single layer takes that layer's."""
    wanted = config(sample, tmp_path / "out", layer_weights=(1.0, 2.0))
    message = "--layer-weights takes a number for each layer: got 2 for the layers 0, 1, 3"
    with pytest.raises(InputError, match=message):
        run(wanted)
    assert not (tmp_path / "out").exists()
    wanted = dataclasses.replace(wanted, layer_weights=(1.0, 2.0, 4.0))
    assert of_sae(wanted, LAYERS, (3,)).layer_weights == (4.0,)


def small_store(path: Path, rows: dict[int, np.ndarray[Any, Any]]) -> Path:
    """A store of these rows by layer, in float32."""
    num_rows, width = rows[0].shape
    with create(
        path,
        tokens=np.arange(num_rows),
        context_length=8,
        layers=rows,
        d_model=width,
        encoding="float32",
        source={"made_by": "test"},
    ) as writer:
        writer.append({("resid_post", layer): values for layer, values in rows.items()})
    return path


@pytest.mark.parametrize("loss_space", ["standardized", "raw"])
def test_units_of_the_rows_make_no_difference(loss_space: str, tmp_path: Path) -> None:
    """Rows scaled by 1e-5 have the FVU of rows that are not: the epsilon is smaller."""
    generator = np.random.default_rng(0)
    x = (generator.normal(0, 1, (800, 3)) @ generator.normal(0, 1, (3, 8))).astype(np.float32)
    found = {}
    for unit in (1.0, 1e-5, 1e-12):
        cache = small_store(tmp_path / f"{unit:g}", {0: unit * x, 1: 3 * unit * x[::-1]})
        settings: dict[str, Any] = {"num_latents": 32, "k": 3, "lr": 3e-3, "batch_size": 64}
        result = run(
            TrainConfig(
                cache=cache,
                out=tmp_path / f"run{unit:g}",
                loss_space=loss_space,
                validation_fraction=0.2,
                device="cpu",
                **settings,
            )
        )
        assert result.metrics is not None
        eps = load(result.directory).config.eps
        assert eps == 1e-5 if unit == 1.0 else eps < 1e-4 * unit
        assert ("eps" in (result.directory / "config.json").read_text()) == (unit != 1.0)
        found[unit] = [entry["fvu"] for entry in result.metrics["position_0_out"]["layers"]]
    for unit in (1e-5, 1e-12):
        np.testing.assert_allclose(found[unit], found[1.0], rtol=0.02)


def test_the_epsilon_is_smaller_for_small_rows_alone(tmp_path: Path) -> None:
    """Rows of equal channels have no spread to be lost."""
    x = np.random.default_rng(0).normal(0, 1, (160, 8)).astype(np.float32)
    still = x.copy()
    still[::2] = 2.0
    store = open_store(small_store(tmp_path / "acts", {0: x, 1: still, 2: 1e-4 * x}))
    moments = store.moments("resid_post", 1)
    asked = TrainConfig(cache=tmp_path, out=tmp_path, num_latents=16, k=2)
    for layers, eps in (((0,), 1e-5), ((1,), 1e-5), ((0, 1), 1e-5), ((0, 2), 1e-5 * 2**-14)):
        assert with_epsilon(sae_config(asked, 8, layers), moments, layers).eps == eps
    plain = sae_config(dataclasses.replace(asked, normalize="none"), 8, (2,))
    assert with_epsilon(plain, moments, (2,)) == plain
    (tmp_path / "out").mkdir()
    sae = SAE(dataclasses.replace(sae_config(asked, 8, (0,)), eps=1e-9))
    sae.save(tmp_path / "sae", {"site": "resid_post", "layers": [0]})
    for form in ("saelens", "mlsae"):
        with pytest.raises(ConversionError, match="adds 1e-09 to standard deviations, for rows th"):
            export_sae(tmp_path / "sae", form, tmp_path / "out")
    for values in ({"eps": 0.0}, {"eps": 1.0}, {"eps": 1e-9, "normalize": "none"}):
        with pytest.raises(InputError, match="eps "):
            dataclasses.replace(sae.config, **values)
