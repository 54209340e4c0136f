"""The variance of the layer, in its terms: planted cases, identities, and brute force."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mlsae.analyze import Analysis, AnalyzeConfig, run
from mlsae.analyze.events.plan import plan_events
from mlsae.analyze.measure.rows import joint as joint_sums
from mlsae.analyze.measure.rows.decomposition import Decomposition, pairs_of
from mlsae.analyze.measure.rows.joint import Joint
from mlsae.analyze.measure.rows.walk import walk
from mlsae.analyze.pairing import pair
from mlsae.sae import SAE, ReLU, SAEConfig
from mlsae.sae import load as load_sae
from mlsae.store import open_store
from mlsae.store.read.split import validation_sequences

Float = npt.NDArray[np.float64]


def _decomposed(z_LTM: Float, layers: tuple[int, ...], *, batch: int) -> Decomposition:
    """Batches of tokens as the walk gives them: values and indices of the few largest."""
    num_latents = z_LTM.shape[2]
    found = Decomposition(layers, num_latents, torch.device("cpu"))
    for first in range(0, z_LTM.shape[1], batch):
        block = {}
        for i, layer in enumerate(layers):
            z = torch.from_numpy(z_LTM[i, first : first + batch])
            values, indices = z.topk(num_latents - i, dim=1)
            block[layer] = values, indices
        found.add(pairs_of(block, num_latents), z_LTM[:, first : first + batch].shape[1])
    return found


def _moments(p_L: Float, layers: tuple[int, ...]) -> tuple[float, float]:
    mean = sum(p * n for p, n in zip(p_L, layers, strict=True))
    return mean, sum(p * (n - mean) ** 2 for p, n in zip(p_L, layers, strict=True))


def _by_definition(weights_TML: Float, layers: tuple[int, ...]) -> dict[str, float]:
    """The terms of the joint distribution in proportion to `weights_TML`, by loops."""
    joint = weights_TML / weights_TML.sum()
    single = tokens = latents = 0.0
    overall, total = _moments(joint.sum(axis=(0, 1)), layers)
    for j in range(joint.shape[1]):
        of_latent = joint[:, j].sum()
        if of_latent == 0:
            continue
        mean_j, _ = _moments(joint[:, j].sum(axis=0) / of_latent, layers)
        latents += of_latent * (mean_j - overall) ** 2
        for t in range(joint.shape[0]):
            of_pair = joint[t, j].sum()
            if of_pair == 0:
                continue
            mean, variance = _moments(joint[t, j] / of_pair, layers)
            single += of_pair * variance
            tokens += of_pair * (mean - mean_j) ** 2
    return {"total": total, "single": single, "tokens": tokens, "latents": latents}


def _published(z_LTM: Float) -> tuple[float, float]:
    """rel_t and rel_f of one batch, as in the published code: 0 / 0 → 0, moments subtracted."""
    ids = np.arange(len(z_LTM))[:, None]

    def var(q: Float) -> Float:
        q = q.reshape(len(ids), -1)
        return np.asarray((ids**2 * q).sum(axis=0) - (ids * q).sum(axis=0) ** 2)

    whole = z_LTM.sum(axis=0)
    p = np.divide(z_LTM, whole, out=np.zeros_like(z_LTM), where=whole > 0)
    of_latents = var(p.mean(axis=1)).mean()
    of_pairs = var(p).mean()
    return of_pairs / of_latents, of_latents / float(var(p.mean(axis=(1, 2)))[0])


@pytest.fixture
def z() -> Float:
    """Values of 9 latents for 30 tokens at 4 layers, most of them 0; the last latent is dead."""
    generator = np.random.default_rng(0)
    z = generator.exponential(size=(4, 30, 9)) * (generator.random((4, 30, 9)) < 0.3)
    z[:, :, 8] = 0
    z[:, 7] = 0
    return np.asarray(z)


LAYERS = (1, 2, 5, 11)


@pytest.mark.parametrize("batch", [1, 7, 30])
def test_both_schemes_match_their_definitions(z: Float, batch: int) -> None:
    terms = _decomposed(z, LAYERS, batch=batch).terms()
    assert terms is not None
    mass = np.moveaxis(z, 0, -1)
    whole = mass.sum(axis=-1, keepdims=True)
    uniform = np.divide(mass, whole, out=np.zeros_like(mass), where=whole > 0)
    for name, weights in (("mass", mass), ("pair_uniform", uniform)):
        found = terms[name].summary()
        expected = _by_definition(weights, LAYERS)
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-11)
        assert found["aggregate"] == pytest.approx(expected["single"] + expected["tokens"])


def test_the_three_terms_add_up_to_the_variance_of_the_layer() -> None:
    generator = np.random.default_rng(1)
    for scale in (1e-6, 1.0, 1e6):
        z = scale * generator.exponential(size=(24, 50, 40)) ** 3
        z *= generator.random(z.shape) < 0.2
        terms = _decomposed(z, tuple(range(24)), batch=16).terms()
        assert terms is not None
        for of in terms.values():
            whole = of.single + of.tokens + of.latents
            assert whole == pytest.approx(of.total, rel=1e-9, abs=0)


def test_the_variance_at_single_tokens_of_each_latent(z: Float) -> None:
    found = _decomposed(z, LAYERS, batch=7).token_variances().numpy()
    for j in range(8):
        weights = z[:, :, j].sum(axis=0)
        variances = [_moments(z[:, t, j] / w, LAYERS)[1] if w else 0 for t, w in enumerate(weights)]
        assert found[j] == pytest.approx(np.average(variances, weights=weights), rel=1e-11)
    assert np.isnan(found[8])


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (4, 5, 6, 7), LAYERS])
def test_as_coded_is_the_published_code_batch_by_batch(z: Float, layers: tuple[int, ...]) -> None:
    """The published code counts layers from 0, whichever they are: its ratios know no ids."""
    found = _decomposed(z, layers, batch=10).summary()
    assert found is not None
    single, aggregate = np.mean([_published(z[:, n : n + 10]) for n in (0, 10, 20)], axis=0)
    assert found["as_coded"] == {
        "num_batches": 3,
        "single_over_aggregate": pytest.approx(single, rel=1e-11),
        "aggregate_over_total": pytest.approx(aggregate, rel=1e-11),
    }


def _planted(kind: str) -> Float:
    """600 tokens, 40 latents, 8 layers: of each token a tenth of the latents."""
    generator = np.random.default_rng(2)
    active = generator.random((600, 40)) < 0.1
    value = generator.exponential(size=(600, 40)) * active
    if kind == "every layer":
        return np.stack([value] * 8)
    z = np.zeros((8, 600, 40))
    layer = generator.integers(0, 8, 600)
    z[layer, np.arange(600)] = value
    return z


def test_the_same_value_at_every_layer_is_all_spread_at_single_tokens() -> None:
    found = _summary(_planted("every layer"))
    for name in ("mass", "pair_uniform"):
        assert found[name]["single_over_aggregate"] >= 0.98
        assert found[name]["total"] == pytest.approx((8**2 - 1) / 12)
    # Pairs that are not active, let in as zeros, hide that.
    assert found["as_coded"]["single_over_aggregate"] < 0.4


def test_one_layer_a_token_is_no_spread_at_single_tokens() -> None:
    found = _summary(_planted("one layer"))
    for name in ("mass", "pair_uniform"):
        assert found[name]["single_over_aggregate"] == pytest.approx(0, abs=1e-12)
        assert found[name]["aggregate_over_total"] > 0.9
    assert found["layers_of_a_pair"] == 1


def _summary(z: Float) -> Mapping[str, Any]:
    found = _decomposed(z, tuple(range(8)), batch=100).summary()
    assert found is not None
    return found


def test_one_layer_has_no_spread_and_no_ratio() -> None:
    found = _decomposed(np.ones((1, 5, 3)), (4,), batch=2).summary()
    assert found is not None
    assert found["mass"]["total"] == 0
    assert found["mass"]["single_over_aggregate"] is None
    assert found["as_coded"]["aggregate_over_total"] is None


@pytest.mark.parametrize("layers", [(0, 1, 2), (3, 7, 31)])
def test_variances_that_are_rounding_are_0_and_divide_nothing(layers: tuple[int, ...]) -> None:
    """A latent of the middle layer alone does not vary, however its weights are summed."""
    generator = np.random.default_rng(3)
    z = np.zeros((3, 40, 5))
    z[1] = generator.exponential(size=(40, 5)) * 10.0 ** generator.integers(-6, 6, (40, 5))
    found = _decomposed(z, layers, batch=7).summary()
    assert found is not None
    for name in ("mass", "pair_uniform"):
        of: Any = found[name]
        assert [of[term] for term in ("total", "single", "tokens", "latents")] == [0.0] * 4
        assert of["single_over_aggregate"] is of["aggregate_over_total"] is None


def test_nothing_active_is_nothing_to_decompose() -> None:
    found = _decomposed(np.zeros((2, 5, 3)), (0, 1), batch=2)
    assert found.terms() is None
    assert found.summary() is None
    assert np.isnan(found.token_variances().numpy()).all()


@pytest.fixture(scope="module")
def analyzed(
    world: Any, sae_maker: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Analysis, Path]:
    """Analysis of the first five of seven validation sequences, three tokens encoded at once."""
    directory = sae_maker(world.store, num_latents=160)
    config = AnalyzeConfig(
        figures=False,
        cache=world.store,
        sae=directory,
        out=tmp_path_factory.mktemp("joint") / "out",
        batch_size=3,
        decomposition_max_tokens=5 * 24 + 23,
    )
    return run(config), directory


@pytest.fixture(scope="module")
def joint(world: Any, analyzed: tuple[Analysis, Path], dense: Callable[..., Any]) -> Any:
    """Token ids, and the values of every latent at the layers 0, 1, 3, dense in float64."""
    sae = dense(load_sae(analyzed[1]))
    plan = open_store(world.store).plan
    covered = validation_sequences(plan.tokens_sha256, 37, 0.2, 3)[:5]
    row = np.arange(len(world.tokens))
    rows = row[np.isin(row // 24, covered) & (world.flags == 0) & (row % 24 >= 1)]
    x = [world.activations[n].astype(np.float64)[rows] for n in (0, 1, 3)]
    return world.tokens[rows], np.stack([sae.latents(of) for of in x])


def test_an_analysis_decomposes_the_variance_over_a_bounded_number_of_tokens(
    analyzed: tuple[Analysis, Path], joint: Any
) -> None:
    found = analyzed[0].summary["layer_variance"]
    ids, z = joint
    assert found["num_tokens"] == len(ids)
    assert found["num_pairs"] == (z > 0).any(axis=0).sum()
    assert found["layers_of_a_pair"] == pytest.approx((z > 0).sum() / found["num_pairs"])
    for name, expected in _by_definition(np.moveaxis(z, 0, -1), (0, 1, 3)).items():
        assert found["mass"][name] == pytest.approx(expected, rel=1e-4)
    assert found["as_coded"]["num_batches"] == 1


def test_the_entropy_over_token_ids_is_that_of_totals_over_all_layers(
    analyzed: tuple[Analysis, Path], joint: Any
) -> None:
    ids, z = joint
    totals = z.sum(axis=0)
    for row in analyzed[0].latents.to_pylist():
        of_latent = totals[:, row["latent"]]
        assert row["num_token_ids"] == len(np.unique(ids[of_latent > 0]))
        if not of_latent.any():
            assert row["token_entropy"] is None
            continue
        p = np.array([of_latent[ids == n].sum() for n in np.unique(ids)]) / of_latent.sum()
        entropy = -sum(q * np.log(q) for q in p if q > 0)
        assert row["token_entropy"] == pytest.approx(entropy, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("block", [5, 23, 2048])
def test_blocks_of_any_number_of_tokens_add_up_to_the_same(
    block: int,
    world: Any,
    sae_maker: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Some blocks of 5 rows have no eligible one; some blocks are covered in part."""
    monkeypatch.setattr(joint_sums, "PUBLISHED_BATCH", block)
    directory = sae_maker(world.store, num_latents=160, skip_positions=16)
    cpu = torch.device("cpu")
    told: list[int] = []
    pairing = pair(world.store, directory, cpu)
    found = Joint(pairing, 12 * 24)
    walk(
        pairing,
        np.arange(3, 14),
        batch_rows=4,
        # Parts of the events end in the midst of batches and blocks.
        events=plan_events(pairing, np.arange(3, 9), 1000, {}),
        directory=tmp_path,
        joint=found,
        examples=None,
        progress=told.append,
    )
    row = np.arange(len(world.tokens))
    rows = row[np.isin(row // 24, range(3, 12)) & (world.flags == 0)]
    eligible = rows % 24 >= 16
    sae = load_sae(directory)
    x = np.stack([world.activations[n][rows[eligible]] for n in (0, 1, 3)])
    encoded = sae.encode(torch.from_numpy(x))
    z = torch.zeros(*x.shape[:2], 160, dtype=torch.float64)
    z.scatter_(2, encoded.indices, encoded.values.double().detach())
    expected = _by_definition(np.moveaxis(z.numpy(), 0, -1), (0, 1, 3))
    terms = found.decomposition.terms()
    assert terms is not None
    mass = terms["mass"].summary()
    assert {name: mass[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found.decomposition.num_tokens == eligible.sum()
    # Rows that are not covered were read too.
    swept = row[np.isin(row // 24, range(3, 14)) & (world.flags == 0)]
    assert sum(told) == 3 * len(swept)
    blocks = [eligible[n : n + block] for n in range(0, len(eligible), block)]
    summary = found.decomposition.summary()
    assert summary is not None
    as_coded: Any = summary["as_coded"]
    assert as_coded["num_batches"] == sum(of.any() for of in blocks)
    _, num_ids = found.token_totals.entropies(160)
    active = (z.numpy() > 0).any(axis=0)
    ids = world.tokens[rows[eligible]]
    assert num_ids.tolist() == [len(np.unique(ids[active[:, j]])) for j in range(160)]


@pytest.mark.parametrize("batch_rows", [1, 3, 100])
def test_rows_of_a_relu_sae_have_as_many_slots_as_any_of_them_needs(batch_rows: int) -> None:
    sae = SAE(SAEConfig(d_in=6, num_latents=20, architecture=ReLU(), encoder_bias=True))
    x = np.random.default_rng(0).normal(size=(10, 6)).astype(np.float32)
    dense = torch.relu(sae.standardize(torch.from_numpy(x))[0] @ sae.W_enc.T).double()
    with torch.no_grad():
        parts = [sae.encode(of) for of in torch.from_numpy(x).split(batch_rows)]
        nothing = sae.encode(torch.from_numpy(x[:0]))
    block = joint_sums.joined([(of.values, of.indices) for of in (*parts, nothing)])
    pairs = pairs_of({0: block}, 20)
    found = torch.zeros(10, 20, dtype=torch.float64)
    found[pairs.tokens, pairs.latents] = pairs.totals
    torch.testing.assert_close(found, dense.detach(), rtol=1e-5, atol=1e-6)
    assert len(pairs_of({0: (nothing.values, nothing.indices)}, 20).totals) == 0
