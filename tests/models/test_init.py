"""Redrawn weights: their statistics, what they depend on, and what is left alone."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mlsae.base.errors import InputError
from mlsae.models import INITS, Transformer, load, load_for
from mlsae.models.weights.initialization import redraw

REDRAWN = ["rerandomized", "rerandomized-keep-embeddings"]
# Statistics of seeded draws: with a bound of 5 standard errors, a right program fails for one seed
# in a million, and these seeds are fixed.
Z = 5.0


@pytest.fixture(scope="module")
def trained(make_model_directory: Callable[[str], Path]) -> Transformer:
    return load(make_model_directory("gpt_neox"))


@pytest.fixture(scope="module")
def redrawn(make_model_directory: Callable[[str], Path]) -> Transformer:
    return load(make_model_directory("gpt_neox"), init="rerandomized", init_seed=3)


def pairs(a: Transformer, b: Transformer) -> list[tuple[str, np.ndarray, np.ndarray]]:
    other = dict(b.model.named_parameters())
    return [
        (name, p.double().numpy().reshape(-1), other[name].double().numpy().reshape(-1))
        for name, p in a.model.named_parameters()
    ]


def test_each_tensor_keeps_its_mean_and_variance(
    trained: Transformer, redrawn: Transformer
) -> None:
    """Sampling errors: σ/√n of the mean, σ²·√(2/(n−1)) of the unbiased variance."""
    for name, old, new in pairs(trained, redrawn):
        n, sigma = old.size, old.std()
        assert abs(new.mean() - old.mean()) <= Z * sigma / np.sqrt(n) + 1e-7, name
        spread = Z * sigma**2 * np.sqrt(2 / (n - 1)) + 1e-9
        assert abs(new.var(ddof=1) - sigma**2) <= spread, name


def test_vectors_are_drawn_too_about_their_own_mean() -> None:
    """A scale about 3 and a shift about −1, long enough to tell: neither is left, nor mixed up."""
    module = nn.LayerNorm(4000).requires_grad_(False)
    module.weight.normal_(3.0, 0.5, generator=torch.Generator().manual_seed(0))
    module.bias.normal_(-1.0, 0.1, generator=torch.Generator().manual_seed(1))
    before = module.weight.clone()
    redraw(module, "rerandomized", 0)
    assert module.weight.mean().item() == pytest.approx(3.0, abs=Z * 0.5 * (2 / 4000) ** 0.5)
    assert module.weight.std().item() == pytest.approx(0.5, rel=Z / 4000**0.5)
    assert module.bias.mean().item() == pytest.approx(-1.0, abs=Z * 0.1 * (2 / 4000) ** 0.5)
    assert abs(float(torch.corrcoef(torch.stack([before, module.weight]))[0, 1])) < Z / 4000**0.5


def test_draws_are_normal() -> None:
    """Kolmogorov-Smirnov against Φ; a uniform or two-valued source has the same two moments."""
    module = nn.Linear(100, 200, bias=False).requires_grad_(False)
    module.weight.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    mean, sigma = module.weight.double().mean(), module.weight.double().std(correction=0)
    redraw(module, "rerandomized", 0)
    z = ((module.weight.double() - mean) / sigma).reshape(-1).sort().values
    cdf = torch.special.ndtr(z)
    n = len(z)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max(float((steps[1:] - cdf).max()), float((cdf - steps[:-1]).max()))
    assert distance < 1.95 / n**0.5  # the 0.1% point


def test_draws_are_independent_of_the_trained_weights_and_of_each_other(
    trained: Transformer, redrawn: Transformer
) -> None:
    large = [(old, new) for _, old, new in pairs(trained, redrawn) if old.size >= 1024]
    assert len(large) > 12
    for old, new in large:
        assert abs(np.corrcoef(old, new)[0, 1]) < Z / np.sqrt(old.size)
    same_size = [new for _, new in large if new.size == 2048]
    correlations = np.corrcoef(same_size) - np.eye(len(same_size))
    assert np.abs(correlations).max() < Z / np.sqrt(2048)


def test_a_tensor_larger_than_a_block_is_one_stream() -> None:
    module = nn.Linear(1 << 11, (1 << 9) + 3, bias=False).requires_grad_(False)
    module.weight.normal_(0.5, 2.0, generator=torch.Generator().manual_seed(0))
    redraw(module, "rerandomized", 0)
    flat = module.weight.reshape(-1)
    n = len(flat)
    assert n > 1 << 20
    assert float(flat.mean()) == pytest.approx(0.5, abs=Z * 2 * (2 / n) ** 0.5)
    assert float(flat.std()) == pytest.approx(2.0, rel=Z / n**0.5)
    assert not torch.equal(flat[: n - (1 << 20)], flat[1 << 20 :])


def test_a_tensor_that_is_not_contiguous_gets_the_same_draws() -> None:
    value = torch.arange(600.0).reshape(20, 30)
    drawn = []
    for parameter in (value.clone(), value.t().contiguous().t()):
        module = nn.Module()
        module.a = nn.Parameter(parameter, requires_grad=False)
        redraw(module, "rerandomized", 0)
        drawn.append(module.a)
    assert not drawn[1].is_contiguous()
    assert torch.equal(drawn[0], drawn[1])


def test_names_and_seed_decide_not_the_order() -> None:
    def make(names: list[str]) -> nn.Module:
        module = nn.Module()
        for name in names:
            value = torch.arange(600.0).reshape(20, 30) + len(name)
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
        redraw(module, "rerandomized", 5)
        return module

    one, two = make(["a", "bb", "ccc"]), make(["ccc", "a"])
    assert torch.equal(one.a, two.a)
    assert torch.equal(one.ccc, two.ccc)
    assert abs(float(torch.corrcoef(torch.stack([one.a.view(-1), one.bb.view(-1)]))[0, 1])) < 0.25
    redraw(two, "rerandomized", 6)
    assert not torch.equal(one.a, two.a)


def test_tied_weights_stay_tied_and_are_drawn_once_under_their_first_name() -> None:
    class Tied(nn.Module):
        def __init__(self, first: str, second: str) -> None:
            super().__init__()
            setattr(self, first, nn.Linear(30, 40, bias=False))
            setattr(self, second, nn.Linear(30, 40, bias=False))
            with torch.no_grad():
                getattr(self, first).weight.copy_(torch.arange(1200.0).reshape(40, 30))
            getattr(self, second).weight = getattr(self, first).weight

    one, two = Tied("a", "z"), Tied("z", "a")
    redraw(one, "rerandomized", 0)
    redraw(two, "rerandomized", 0)
    assert one.a.weight is one.z.weight
    assert torch.equal(one.a.weight, two.a.weight)
    # Drawn twice, the second draw would take mean and variance from the first.
    alone = nn.Module()
    alone.a = nn.Linear(30, 40, bias=False)
    with torch.no_grad():
        alone.a.weight.copy_(torch.arange(1200.0).reshape(40, 30))
    redraw(alone, "rerandomized", 0)
    assert torch.equal(one.a.weight, alone.a.weight)


def test_a_tied_model_reloads_tied(make_model_directory: Callable[[str], Path]) -> None:
    model = load(make_model_directory("llama"), init="rerandomized").model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_buffers_are_untouched() -> None:
    module = nn.BatchNorm1d(50)
    module.running_mean.copy_(torch.arange(50.0))
    redraw(module, "rerandomized", 0)
    assert torch.equal(module.running_mean, torch.arange(50.0))
    assert torch.equal(module.running_var, torch.ones(50))


def test_constant_tensors_stay_what_they_are() -> None:
    """A variance of zero: LayerNorm's scale and shift in a model never trained."""
    module = nn.LayerNorm(16)
    redraw(module, "rerandomized", 0)
    assert torch.equal(module.weight, torch.ones(16))
    assert torch.equal(module.bias, torch.zeros(16))


def test_precision_changes_the_rounding_only(
    make_model_directory: Callable[[str], Path], redrawn: Transformer
) -> None:
    half = load(
        make_model_directory("gpt_neox"), init="rerandomized", init_seed=3, dtype="bfloat16"
    )
    for name, p in half.model.named_parameters():
        assert p.dtype == torch.bfloat16
        full = redrawn.model.get_parameter(name)
        torch.testing.assert_close(
            p.float(), full, rtol=2**-7, atol=2**-7 * float(full.std() + 1e-3)
        )


def test_keep_embeddings_keeps_both_and_nothing_else(
    make_model_directory: Callable[[str], Path], trained: Transformer
) -> None:
    """The two token matrices stay; GPT-2's position embeddings are redrawn like any weight."""
    kept = load(make_model_directory("gpt_neox"), init="rerandomized-keep-embeddings")
    same = {
        name
        for name, old, new in pairs(trained, kept)
        if np.array_equal(old, new) and old.std() > 0
    }
    assert same == {"gpt_neox.embed_in.weight", trained_unembedding(trained)}
    gpt2 = make_model_directory("gpt2")
    before, after = load(gpt2), load(gpt2, init="rerandomized-keep-embeddings")
    same = {n for n, old, new in pairs(before, after) if np.array_equal(old, new) and old.std() > 0}
    assert same == {"transformer.wte.weight"}


def trained_unembedding(transformer: Transformer) -> str:
    head = transformer.model.get_output_embeddings().weight
    return next(name for name, p in transformer.model.named_parameters() if p is head)


@pytest.mark.parametrize("init", INITS)
def test_every_variant_is_rebuilt_from_its_record(model_directory: Path, init: str) -> None:
    first = load(model_directory, init=init, init_seed=7)
    record = json.loads(json.dumps(first.describe()))
    assert record["init"] == init
    assert record["init_seed"] == (None if init == "trained" else 7)
    again = load_for(record, model_directory)
    assert again.describe() == first.describe()
    assert (again.init, again.init_seed) == (init, 0 if init == "trained" else 7)


def test_variants_and_seeds_differ(model_directory: Path) -> None:
    """`control` alone has the trained weights: its noise comes at run time."""
    models = [load(model_directory, init=init, init_seed=5) for init in INITS]
    assert len({model.fingerprint() for model in models}) == len(INITS) - 1
    assert models[-1].fingerprint() == models[0].fingerprint()
    for init in ("rerandomized", "random"):
        other = load(model_directory, init=init, init_seed=6)
        assert other.fingerprint() != models[INITS.index(init)].fingerprint()


@pytest.mark.parametrize("init", ["rerandomized", "random"])
def test_a_record_with_another_seed_is_refused(model_directory: Path, init: str) -> None:
    record = {**load(model_directory, init=init, init_seed=7).describe(), "init_seed": 8}
    with pytest.raises(InputError, match=r"is not the one .* expected weights with SHA-256"):
        load_for(record, model_directory)


def test_random_needs_no_weights_and_leaves_the_generator_alone(
    make_model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    config = make_model_directory("gpt_neox") / "config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    state = torch.get_rng_state()
    model = load(tmp_path, init="random", init_seed=1, dtype="bfloat16")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.dtype == torch.bfloat16
    torch.manual_seed(99)
    assert load(tmp_path, init="random", init_seed=1, dtype="bfloat16").fingerprint() == (
        model.fingerprint()
    )
    torch.set_rng_state(state)


def test_random_is_the_initialisation_of_the_config(
    make_model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((make_model_directory("gpt_neox") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "initializer_range": 0.07}))
    weights = load(tmp_path, init="random").blocks[0].mlp.dense_h_to_4h.weight
    assert weights.std().item() == pytest.approx(0.07, rel=Z / (2 * weights.numel()) ** 0.5)
    assert weights.mean().item() == pytest.approx(0, abs=Z * 0.07 / weights.numel() ** 0.5)


@pytest.mark.parametrize("init", REDRAWN)
def test_quantised_weights_are_refused(init: str) -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            packed = torch.ones(4, 4, dtype=torch.uint8)
            self.packed = nn.Parameter(packed, requires_grad=False)

        def get_input_embeddings(self) -> None:
            return None

        get_output_embeddings = get_input_embeddings

    with pytest.raises(InputError, match=r"packed is torch\.uint8: give a model that is not quant"):
        redraw(Quantised(), init, 0)


def test_unknown_init_and_seed(model_directory: Path) -> None:
    with pytest.raises(InputError) as info:
        load(model_directory, init="step0")
    assert str(info.value) == (
        "--init must be one of trained, rerandomized, rerandomized-keep-embeddings, random, "
        "control, got 'step0'"
    )
    for seed in (-1, 2**63):
        with pytest.raises(InputError, match=r"--init-seed must be from 0 to 2\^63 - 1, got"):
            load(model_directory, init="random", init_seed=seed)
