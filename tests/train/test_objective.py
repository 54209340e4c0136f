"""The loss and a step, against dense autograd in float64 written from the formulas."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from mlsae.base.errors import InputError
from mlsae.sae import SAE, SAEConfig, TopK
from mlsae.store import open_store
from mlsae.train.data.loader import Batch
from mlsae.train.step.auxiliary import default_k_aux
from mlsae.train.step.dead import DeadLatents, default_dead_after
from mlsae.train.step.objective import Objective, layer_variances
from mlsae.train.step.schedule import Schedule
from mlsae.train.step.trainer import DivergedError, Trainer

D, N, K, L = 12, 64, 4, 3
VARIANCES = np.array([3.0, 7.0, 11.0])
NO_LATENT = torch.zeros(0, dtype=torch.int64)


def make_sae(seed: int = 0, dtype: torch.dtype = torch.float64) -> SAE:
    sae = SAE(
        SAEConfig(d_in=D, num_latents=N, architecture=TopK(K)), torch.Generator().manual_seed(seed)
    )
    with torch.no_grad():
        sae.b.copy_(torch.linspace(-0.3, 0.3, D))
    sae.to(dtype).normalize_decoder()
    return sae


def make_batch(num_rows: int = 50, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layer = torch.randint(L, (num_rows,), generator=generator)
    x = torch.randn(num_rows, D, generator=generator, dtype=torch.float64)
    return x * (1 + 10 * layer[:, None]) + layer[:, None], layer


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def dense_loss(
    params: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    x: torch.Tensor,
    layer: torch.Tensor,
    *,
    raw: bool,
    dead: torch.Tensor,
    k_aux: int,
) -> torch.Tensor:
    """The formulas with dense tensors and torch's own autograd; nothing of ours."""
    W_enc, W_dec, b = params
    m, s = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    u = (x - m) / (s + 1e-5)
    pre = (u - b) @ W_enc.T
    at = pre.topk(K, dim=1).indices
    z = torch.zeros_like(pre).scatter(1, at, pre.gather(1, at)).relu()
    u_hat = z @ W_dec + b
    error = x - (u_hat * s + m) if raw else u - u_hat
    main = (error.square().sum(1) / torch.from_numpy(VARIANCES)[layer]).sum() / len(x)
    if not len(dead):
        return main
    e = (u - u_hat).detach()
    masked = torch.full_like(pre, -torch.inf)
    masked[:, dead] = pre[:, dead]
    at = masked.topk(min(k_aux, len(dead)), dim=1).indices
    z_aux = torch.zeros_like(pre).scatter(1, at, pre.gather(1, at)).relu()
    e_hat = z_aux @ W_dec
    scale = min(1, len(dead) / k_aux) / 32
    return main + scale * (e - e_hat).square().sum() / e.square().sum()


def take(
    sae: SAE,
    objective: Objective,
    batch: tuple[torch.Tensor, torch.Tensor],
    dead: torch.Tensor = NO_LATENT,
    cuts: tuple[int, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Main term, AuxK and the gradients of a batch, taken in pieces that end at `cuts`."""
    x, layer = batch
    for parameter in sae.parameters():
        parameter.grad = None
    edges = [0, *cuts, len(x)]
    pieces = [
        objective.accumulate(x[a:b], layer[a:b], len(x), 0 if len(dead) else None)
        for a, b in itertools.pairwise(edges)
    ]
    aux = torch.zeros((), dtype=x.dtype)
    if len(dead):
        residuals = [piece.residual for piece in pieces if piece.residual is not None]
        aux = objective.accumulate_auxiliary(residuals, dead, same)
    gradients = [p.grad for p in sae.parameters() if p.grad is not None]
    return torch.stack([piece.main for piece in pieces]).sum(), aux, gradients


@pytest.mark.parametrize("raw", [False, True], ids=["standardized", "raw"])
@pytest.mark.parametrize("num_dead", [0, 3, 40])
@pytest.mark.parametrize("num_rows", [1, 50])
def test_loss_and_gradients_equal_dense_autograd(raw: bool, num_dead: int, num_rows: int) -> None:
    """To 1e-9, with fewer and with more dead latents than k_aux, AuxK's encoder gradient too."""
    sae = make_sae()
    x, layer = make_batch(num_rows)
    dead = torch.arange(num_dead) * 64 // 40
    objective = Objective(sae, VARIANCES, "raw" if raw else "standardized")
    main, aux, got = take(sae, objective, (x, layer), dead)
    params = tuple(p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.W_dec, sae.b))
    expected = dense_loss(params, x, layer, raw=raw, dead=dead, k_aux=objective.k_aux)
    torch.testing.assert_close(main + aux, expected.detach(), rtol=1e-9, atol=1e-9)
    names = [name for name, _ in sae.named_parameters()]
    assert names == ["W_enc", "W_dec", "b"]
    for a, b in zip(got, torch.autograd.grad(expected, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_aux_reaches_the_encoder_and_not_what_it_explains() -> None:
    """AuxK alone moves dead latents' rows and b through the encoder, no live latent's."""
    sae = make_sae()
    batch = make_batch()
    dead = torch.tensor([1, 5, 60])
    objective = Objective(sae, VARIANCES, "standardized")
    without = take(sae, objective, batch)[2]
    moves = [a - b for a, b in zip(take(sae, objective, batch, dead)[2], without, strict=True)]
    for move in moves[:2]:
        assert move.abs().sum(1).nonzero()[:, 0].tolist() == dead.tolist()
    assert moves[2].abs().max() > 0


def test_no_residual_gives_no_aux() -> None:
    """0, and no NaN in the gradient."""
    sae = make_sae()
    x, layer = make_batch()
    with torch.no_grad():
        sae.b.zero_()
    objective = Objective(sae, VARIANCES, "standardized")
    _, aux, gradients = take(sae, objective, (torch.full_like(x, 2.0), layer), torch.tensor([3]))
    assert aux == 0
    assert all(grad.isfinite().all() for grad in gradients)


@pytest.mark.parametrize("cuts", [(17, 17), (1,), tuple(range(5, 50, 5))])
def test_pieces_of_a_batch_add_up_to_it(cuts: tuple[int, ...]) -> None:
    """Cut anywhere, empty pieces included: same loss and gradients, AuxK's too."""
    sae = make_sae()
    objective = Objective(sae, VARIANCES, "standardized")
    dead = torch.arange(10)
    whole = take(sae, objective, make_batch(), dead)
    pieces = take(sae, objective, make_batch(), dead, cuts)
    for a, b in zip((*whole[:2], *whole[2]), (*pieces[:2], *pieces[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_counts_of_a_batch() -> None:
    """Rows, errors and active values by layer, and which latents fired."""
    sae = make_sae()
    x, layer = make_batch()
    losses = Objective(sae, VARIANCES, "raw").accumulate(x, layer, 50, None)
    latents = sae.encode(x)
    assert losses.num_active == (latents.values > 0).sum()
    used = latents.indices[latents.values > 0].unique()
    assert losses.fired.nonzero()[:, 0].tolist() == used.tolist()
    assert losses.layer_rows.tolist() == np.bincount(layer, minlength=L).tolist()
    errors = (x - sae(x)).square().sum(1).detach().numpy()
    expected = np.bincount(layer, weights=errors, minlength=L) / VARIANCES
    np.testing.assert_allclose(losses.layer_errors.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("d_in", "k_aux"), [(768, 512), (64, 32), (512, 256), (2, 1), (96, 64), (90, 32), (4096, 2048)]
)
def test_k_aux_is_the_power_of_two_nearest_half_the_width(d_in: int, k_aux: int) -> None:
    """Ties go up: 384 lies between 256 and 512."""
    assert default_k_aux(d_in) == k_aux


@pytest.mark.parametrize("loss_space", ["standardized", "raw"])
def test_layer_variances_are_those_of_the_eligible_rows(loss_space: str, sample) -> None:
    """Σ_d of each channel's variance over eligible rows, by brute force from the store's values."""
    store = open_store(sample.path)
    got = layer_variances(store.moments("resid_post", 2), (1, 3), loss_space)
    eligible = store.eligible(2)
    for variance, layer in zip(got, (1, 3), strict=True):
        x = store.read("resid_post", layer)[eligible].astype(np.float64)
        if loss_space == "standardized":
            spread = x.std(1, ddof=1, keepdims=True)
            x = (x - x.mean(1, keepdims=True)) / (spread + 1e-5)
        np.testing.assert_allclose(variance, x.var(0).sum(), rtol=1e-5)


def test_a_layer_that_does_not_vary_is_refused(sample) -> None:
    """The weight of such a layer would divide by zero."""
    moments = open_store(sample.path).moments("resid_post", 1)
    still = dataclasses.replace(moments, u_m2=np.zeros_like(moments.u_m2))
    with pytest.raises(InputError, match=r"layer 1 do not vary \(variance 0\)"):
        layer_variances(still, (1, 3), "standardized")


def test_a_latent_is_dead_after_so_many_rows_without_use() -> None:
    """Counted in rows, batch by batch; use brings it back."""
    dead = DeadLatents(3, dead_after=20, device=torch.device("cpu"))
    seen = []
    for fired in ([1, 0, 0], [1, 0, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]):
        dead.update(torch.tensor(fired), 10)
        seen.append(dead.indices().tolist())
    assert seen == [[], [1], [1], [2], [2]]
    assert dead.num_rows == 50


@pytest.mark.parametrize(
    ("num_layers", "run_rows", "expected"),
    [(6, 10**10, 6 * 10**7), (6, 10**6, 10**5), (1, 5, 1)],
)
def test_dead_after_is_ten_million_rows_a_layer_or_a_tenth_of_the_run(
    num_layers: int, run_rows: int, expected: int
) -> None:
    """Whichever is less."""
    assert default_dead_after(num_layers, run_rows) == expected


def test_the_schedule_rises_holds_and_falls() -> None:
    """1% of the steps up, 20% down, both linear; the very first step moves already."""
    rates = [Schedule(2.0, 1000, 0.01, 0.2)(step) for step in range(1000)]
    np.testing.assert_allclose(rates[:10], [2 * (i + 1) / 11 for i in range(10)])
    assert set(rates[10:800]) == {2.0}
    np.testing.assert_allclose(rates[800:], [2 * i / 201 for i in range(200, 0, -1)])
    assert [Schedule(2.0, 10, 0, 0)(step) for step in range(10)] == [2.0] * 10


def trainer(sae: SAE, dead_after: int = 10**9) -> Trainer:
    return Trainer(
        sae,
        Objective(sae, VARIANCES, "standardized"),
        Schedule(1e-3, 50, 0.1, 0.2),
        DeadLatents(N, dead_after, torch.device("cpu")),
        Accelerator(cpu=True),
    )


def test_fifty_steps_equal_dense_autograd_and_torchs_adam() -> None:
    """Losses and parameters, in float64, with dead latents on the way."""
    sae = make_sae()
    ours = trainer(sae, dead_after=100)
    W_enc, W_dec, b = (p.detach().clone().requires_grad_() for p in sae.parameters())
    adam = torch.optim.Adam([W_enc, W_dec, b], betas=(0.9, 0.999), eps=6.25e-10)
    num_dead = []
    for step in range(50):
        x, layer = make_batch(seed=step)
        dead = ours.dead.indices()
        num_dead.append(len(dead))
        result = ours.step(Batch(x, layer, 50))
        loss = dense_loss((W_enc, W_dec, b), x, layer, raw=False, dead=dead, k_aux=8)
        np.testing.assert_allclose(result.loss, loss.item(), rtol=1e-9)
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            adam.param_groups[0]["lr"] = Schedule(1e-3, 50, 0.1, 0.2)(step)
            adam.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
    assert max(num_dead) > 0
    for mine, other in zip(sae.parameters(), (W_enc, W_dec, b), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N, dtype=torch.float64))


def test_the_decoder_gradient_has_no_part_along_its_rows() -> None:
    """The optimiser sees a tangential gradient."""
    sae = make_sae()
    ours = trainer(sae)
    before = sae.W_dec.detach().clone()
    x, layer = make_batch()
    ours.step(Batch(x, layer, 50))
    assert sae.W_dec.grad is not None
    assert sae.W_dec.grad.abs().max() > 1e-4
    assert (sae.W_dec.grad * before).sum(1).abs().max() < 1e-15


def test_a_loss_that_is_no_number_stops_before_the_weights_change() -> None:
    """Step and learning rate are named."""
    sae = make_sae()
    ours = trainer(sae)
    before = sae.W_enc.detach().clone()
    x, layer = make_batch()
    x[3, 4] = torch.nan
    with pytest.raises(DivergedError, match=r"the loss is nan at step 0 with learning rate 0\.000"):
        ours.step(Batch(x, layer, 50))
    assert torch.equal(sae.W_enc, before)


def test_fifty_steps_follow_the_recorded_curve(golden: Path) -> None:
    """The float64 losses of one seed, as recorded when they were proved equal to dense autograd."""
    ours = trainer(make_sae(), dead_after=100)
    losses = []
    for step in range(50):
        x, layer = make_batch(seed=step)
        losses.append(ours.step(Batch(x, layer, 50)).loss)
    np.testing.assert_allclose(losses, np.loadtxt(golden), rtol=1e-9)


@pytest.fixture
def golden() -> Path:
    return Path(__file__).with_name("golden_losses.txt")
