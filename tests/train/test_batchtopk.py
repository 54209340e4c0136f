"""BatchTopK and nested prefixes: steps against the formulas, groups, thresholds, refusals."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from mlsae.base.errors import InputError
from mlsae.sae import SAE, Architecture, SAEConfig, TopK, load
from mlsae.sae.architectures import BatchTopK
from mlsae.sae.architectures.matryoshka import parse_prefixes, widths
from mlsae.store import open_store
from mlsae.train import TrainConfig, run
from mlsae.train.calibrate import Histogram
from mlsae.train.data.loader import Batch
from mlsae.train.running.memory import step_memory
from mlsae.train.step.dead import DeadLatents
from mlsae.train.step.objective import Objective
from mlsae.train.step.schedule import Schedule
from mlsae.train.step.trainer import Trainer

D, N, K, L, ROWS, LANES = 12, 64, 4, 3, 48, 4
VARIANCES = np.array([3.0, 7.0, 11.0])
PREFIXES = (8, 30, N)
Pair = tuple[torch.Tensor, torch.Tensor]


def make_sae(architecture: Architecture, prefixes: tuple[int, ...] | None = None) -> SAE:
    """In float64; two encoder rows are equal, so that values tie."""
    config = SAEConfig(d_in=D, num_latents=N, architecture=architecture, matryoshka_widths=prefixes)
    sae = SAE(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b.copy_(torch.linspace(-0.3, 0.3, D))
        sae.W_enc[40] = sae.W_enc[3]
    sae.double().normalize_decoder()
    return sae


def make_batch(seed: int, num_rows: int = ROWS) -> Batch:
    """Lanes of unequal size, whose rows do not follow each other."""
    generator = torch.Generator().manual_seed(seed)
    layer = torch.randint(L, (num_rows,), generator=generator)
    lane = torch.randint(LANES, (num_rows,), generator=generator)
    x = torch.randn(num_rows, D, generator=generator, dtype=torch.float64)
    return Batch(x * (1 + layer[:, None]) + layer[:, None], layer, num_rows, lane=lane)


def make_trainer(sae: SAE, micro_batch: int | None = None, dead_after: int = 100) -> Trainer:
    return Trainer(
        sae,
        Objective(sae, VARIANCES, "standardized"),
        Schedule(1e-2, 50, 0.1, 0.2),
        DeadLatents(N, dead_after, torch.device("cpu")),
        Accelerator(cpu=True),
        micro_batch,
    )


def mask_of(pre: torch.Tensor, lane: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """Entries that are kept, by sorting; of equal ones the first of its group."""
    mask = torch.zeros_like(pre, dtype=torch.bool)
    if isinstance(architecture, TopK):
        return mask.scatter(1, pre.topk(K, dim=1).indices, value=True)
    for one in lane.unique():
        rows = (lane == one).nonzero()[:, 0]
        order = pre[rows].reshape(-1).sort(descending=True, stable=True).indices
        flat = torch.zeros(len(rows) * N, dtype=torch.bool)
        flat[order[: K * len(rows)]] = True
        mask[rows] = flat.view(len(rows), N)
    return mask


def dense_loss(
    params: Sequence[torch.Tensor],
    batch: Batch,
    architecture: Architecture,
    prefixes: Sequence[int],
    dead: torch.Tensor,
    k_aux: int,
) -> torch.Tensor:
    """Formulas with dense tensors and torch's own autograd; nothing of ours."""
    W_enc, W_dec, b = params
    x = batch.x
    u = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    pre = (u - b) @ W_enc.T
    assert batch.lane is not None
    z = pre.where(mask_of(pre.detach(), batch.lane, architecture), 0.0).relu()
    losses = [
        ((u - z[:, :m] @ W_dec[:m] - b).square().sum(1) / torch.from_numpy(VARIANCES)[batch.layer])
        for m in prefixes
    ]
    main = torch.stack(losses).mean(dim=0).sum() / len(x)
    if not len(dead):
        return main
    e = (u - z @ W_dec - b).detach()
    values, at = pre[:, dead].topk(min(k_aux, len(dead)), dim=1)
    e_hat = torch.zeros_like(pre[:, dead]).scatter(1, at, values.relu()) @ W_dec[dead]
    scale = min(1, len(dead) / k_aux) / 32
    return main + scale * (e - e_hat).square().sum() / e.square().sum()


@pytest.mark.parametrize(
    ("architecture", "prefixes"),
    [(BatchTopK(K), None), (BatchTopK(K), PREFIXES), (TopK(K), PREFIXES)],
    ids=["batchtopk", "batchtopk nested", "topk nested"],
)
def test_fifty_steps_equal_dense_autograd_and_torchs_adam(
    architecture: Architecture, prefixes: tuple[int, ...] | None
) -> None:
    """Losses and parameters in float64, with dead latents on the way and equal values."""
    sae = make_sae(architecture, prefixes)
    ours = make_trainer(sae)
    trained = [sae.W_enc, sae.W_dec, sae.b]
    W_enc, W_dec, b = params = [p.detach().clone().requires_grad_() for p in trained]
    adam = torch.optim.Adam(params, betas=(0.9, 0.999), eps=6.25e-10)
    most_dead = 0
    for step in range(50):
        batch, dead = make_batch(step), ours.dead.indices()
        most_dead = max(most_dead, len(dead))
        result = ours.step(batch)
        loss = dense_loss(params, batch, architecture, prefixes or (N,), dead, k_aux=8)
        np.testing.assert_allclose(result.loss, loss.item(), rtol=1e-9)
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            adam.param_groups[0]["lr"] = Schedule(1e-2, 50, 0.1, 0.2)(step)
            adam.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
    assert most_dead > 0
    for mine, other in zip(trained, (W_enc, W_dec, b), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", [BatchTopK(K), TopK(K)], ids=["batchtopk", "topk"])
def test_one_prefix_is_none_to_the_bit(architecture: Architecture) -> None:
    """Weights after some steps, and losses."""
    plain, nested = make_sae(architecture), make_sae(architecture, widths((1,), N))
    trainers = make_trainer(plain), make_trainer(nested)
    for step in range(6):
        losses = [trainer.step(make_batch(step)).loss for trainer in trainers]
        assert losses[0] == losses[1]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, nested.state_dict()[name]), name


@pytest.mark.parametrize("prefixes", [None, PREFIXES], ids=["plain", "nested"])
def test_ranks_and_pieces_add_up_to_the_batch(prefixes: tuple[int, ...] | None) -> None:
    """Lanes on 1, 2 and 4 ranks, and pieces of whole groups, have one batch's loss and gradients.

    Each rank's budget is that of its groups, so none has to know of another.
    """
    batch, found = make_batch(0, 200), []
    assert batch.lane is not None
    for world_size, micro_batch in ((1, None), (1, 60), (2, None), (4, 10)):
        sae = make_sae(BatchTopK(K), prefixes)
        errors, gradients = torch.zeros(L, dtype=torch.float64), []
        for rank in range(world_size):
            trainer = make_trainer(sae, micro_batch)
            trainer.optimizer.step = lambda _: None  # type: ignore[method-assign]
            share = batch.part(batch.lane % world_size == rank)
            errors += trainer.step(share).layer_errors
            gradients.append([p.grad for p in (sae.W_enc, sae.W_dec, sae.b)])
        summed = [torch.stack(parts).sum(dim=0) for parts in zip(*gradients, strict=True)]
        found.append([errors, *summed])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_step_counts_by_prefix_and_layer() -> None:
    """Errors and active values, as encoding with the latents that were kept gives them."""
    sae, batch = make_sae(BatchTopK(K), PREFIXES), make_batch(3)
    u = sae.standardize(batch.x).u
    pre = (u - sae.b) @ sae.W_enc.T
    assert batch.lane is not None
    z = pre.where(mask_of(pre, batch.lane, sae.architecture), 0.0)
    result = make_trainer(sae).step(batch)
    assert result.nested is not None
    start = make_sae(BatchTopK(K), PREFIXES)
    for g, m in enumerate(PREFIXES):
        errors = (u - z[:, :m] @ start.W_dec[:m] - start.b).square().sum(1)
        for layer in range(L):
            here = batch.layer == layer
            expected = errors[here].sum().item() / VARIANCES[layer]
            assert result.nested[0, g, layer] == pytest.approx(expected)
            assert result.nested[1, g, layer] == (z[here, :m] != 0).sum()
    assert torch.equal(result.layer_errors, result.nested[0, -1])


def test_a_histogram_finds_the_value_with_so_many_above() -> None:
    """Values come in parts, of which the first raise the bound; few, many and none are wanted."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(50, 40, generator=generator) * scale for scale in (1, 3, 0.1, 2)]
    values = torch.cat(parts).reshape(-1)
    for most, wanted in ((20, 20), (400, 300), (4000, 3000), (9000, 9000)):
        histogram = Histogram(most, torch.device("cpu"))
        for part in parts:
            histogram.add(part)
        above = int((values > histogram.threshold(wanted)).sum())
        assert above == pytest.approx(min(wanted, int((values > 0).sum())), abs=2)


SETTINGS: dict[str, Any] = {
    "architecture": "batchtopk",
    "k": 4,
    "num_latents": 64,
    "matryoshka": (3,),
    "batch_size": 60,
    "lr": 3e-3,
    "validation_fraction": 0.1,
    "device": "cpu",
}


@pytest.fixture
def config(sample: Any, tmp_path: Path) -> dict[str, Any]:
    return {"cache": sample.path, "out": tmp_path / "sae", **SETTINGS}


class StopError(Exception):
    """Ends a run in the middle."""


def test_a_run_sets_its_threshold_and_goes_on_exactly(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out rows use k latents at each layer; a stopped run ends with the same bytes."""
    config["threshold"] = "layer"
    directory = run(TrainConfig(**config)).directory
    sae = load(directory)
    assert sae.config.prefixes == (16, 32, 64)
    layers = sae.training_record["metrics"]["position_0_out"]["layers"]
    for entry in layers:
        assert entry["l0"] == pytest.approx(4, rel=0.01)
        last = entry["prefixes"][-1]
        assert [last[name] for name in ("num_latents", "fvu", "l0")] == [
            64,
            entry["fvu"],
            entry["l0"],
        ]
        sizes = [one["l0"] for one in entry["prefixes"]]
        assert sizes == sorted(sizes)
    line = json.loads((directory / "log.jsonl").read_text().splitlines()[-1])
    assert line["l0_by_prefix"][-1] == line["l0_by_layer"]
    assert line["fvu_by_prefix"][-1] == line["fvu_by_layer"]
    assert np.shape(line["l0_by_prefix"]) == (3, len(layers))
    original = Trainer.step

    def failing(self: Trainer, batch: Any) -> Any:
        if self.step_number == 5:
            raise StopError
        return original(self, batch)

    config["out"] = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", failing)
        with pytest.raises(StopError):
            run(TrainConfig(**config, checkpoint_seconds=0))
    again = run(TrainConfig(**config, resume=True)).directory
    expected = load_file(directory / "sae.safetensors")
    assert expected.keys() == {"W_enc", "W_dec", "b", "threshold"}
    for name, tensor in load_file(again / "sae.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_latents_are_those_above_the_threshold_of_the_layer(sample: Any) -> None:
    """By brute force; and without a layer there is one line."""
    layers = open_store(sample.path).layers
    architecture = BatchTopK(4, threshold="layer")
    sae = SAE(SAEConfig(d_in=D, num_latents=N, architecture=architecture, layers=layers))
    with torch.no_grad():
        sae.get_parameter("threshold").copy_(torch.linspace(0.5, 2.0, len(layers)))
    x = torch.randn(20, D)
    a = ((sae.standardize(x).u - sae.b) @ sae.W_enc.T).relu()
    for at, layer in enumerate(layers):
        found = torch.zeros(20, N).scatter_(1, *reversed(sae.encode(x, layer)[:2]))
        torch.testing.assert_close(found, a.where(a > sae.get_parameter("threshold")[at], 0.0))
    with pytest.raises(InputError, match="give the layer of the rows"):
        sae.encode(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalize": "none"}, "shares latents among rows, and of rows as they are the longest"),
        ({"k": 65}, "k must be at most num_latents: got k 65 and 64 latents"),
        ({"threshold": "both"}, "--threshold must be one or layer, got 'both'"),
        ({"matryoshka": (8,)}, "--matryoshka 8 is a number of prefixes, each half as wide"),
        ({"matryoshka": (0,)}, "--matryoshka 0 is a number of prefixes, each half as wide"),
        ({"matryoshka": (16, 16)}, "--matryoshka takes rising widths of at least 1, got 16,16"),
        ({"matryoshka": (0, 16)}, "--matryoshka takes rising widths of at least 1, got 0,16"),
        ({"matryoshka": (16, 80)}, "--matryoshka has a prefix of 80 latents, and there are 64"),
        ({"micro_batch": 3}, "--micro-batch must hold a group of --architecture batchtopk, 6 rows"),
        ({"batch_size": 30}, "among the rows of a group, 16 of them in a batch: got 30 rows"),
        ({"validation_fraction": 0.0}, "takes its threshold from rows held out, and there are"),
        ({"precision": "bfloat16"}, "--precision bfloat16 is for --architecture topk; batchtopk"),
        (
            {"architecture": "topk", "threshold": "one"},
            "--threshold belongs to --architecture batchtopk, got topk: leave it out, or choose",
        ),
        (
            {"architecture": "relu", "l1": 0.1},
            "--matryoshka belongs to --architecture topk or batchtopk, got relu: leave it out",
        ),
    ],
)
def test_settings_that_make_no_sense_are_one_line(
    config: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    """Before anything is written."""
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        run(TrainConfig(**config | change))
    assert "\n" not in str(raised.value)
    assert not config["out"].exists()


def test_prefixes_are_a_number_or_widths() -> None:
    """All latents are the last prefix; halves are rounded down."""
    assert parse_prefixes("256,1k") == (256, 1000)
    assert widths(None, 64) is None
    assert widths((4,), 100) == (12, 25, 50, 100)
    assert widths((7,), 64) == (1, 2, 4, 8, 16, 32, 64)
    assert widths((16, 32), 64) == widths((16, 32, 64), 64) == (16, 32, 64)


def test_memory_is_counted_for_the_prefixes() -> None:
    """A prefix costs rows × channels, and a budget of k no more than TopK's k."""
    shape = {"d_in": 64, "num_latents": 4096}
    plain = SAEConfig(architecture=TopK(8), **shape)
    nested = SAEConfig(architecture=BatchTopK(8), matryoshka_widths=(1024, 4096), **shape)
    parts = [step_memory(sae, 512, 64, mixed=False) for sae in (plain, nested)]
    more = parts[1]["activations"] - parts[0]["activations"]
    assert math.isclose(more, 512 * 10 * 64 * 4, rel_tol=0.01)
