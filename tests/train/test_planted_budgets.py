"""Planted data for rows that share latents, and for latents that are nested."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from mlsae.sae import SAE, Architecture, SAEConfig, TopK
from mlsae.sae.architectures import BatchTopK
from mlsae.train.calibrate import Histogram
from mlsae.train.data.loader import Batch
from mlsae.train.data.sampler import NUM_LANES
from mlsae.train.step.dead import DeadLatents
from mlsae.train.step.objective import Objective
from mlsae.train.step.schedule import Schedule
from mlsae.train.step.trainer import Trainer

D, ROWS = 64, 1024
Rows = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Rows (B, D), and what was planted in each."""


def directions(num: int, generator: torch.Generator) -> torch.Tensor:
    found = torch.randn(num, D, generator=generator)
    return found / found.norm(dim=1, keepdim=True)


def trained(
    architecture: Architecture,
    num_latents: int,
    rows: Rows,
    steps: int,
    prefixes: tuple[int, ...] | None = None,
) -> SAE:
    """An SAE after some steps, with a threshold where it has one; lengths of rows stay."""
    config = SAEConfig(
        d_in=D,
        num_latents=num_latents,
        architecture=architecture,
        normalize="scale",
        layers=(0,),
        matryoshka_widths=prefixes,
    )
    sae = SAE(config, torch.Generator().manual_seed(0))
    x, _ = rows(20_000)
    assert sae.layer_factor is not None
    sae.layer_factor.fill_((D / x.square().sum(1).mean().item()) ** 0.5)
    trainer = Trainer(
        sae,
        Objective(sae, np.array([x.var(0).sum().item()]), "standardized"),
        Schedule(3e-3, steps, 0.01, 0.2),
        DeadLatents(num_latents, 100 * ROWS, torch.device("cpu")),
        Accelerator(cpu=True),
    )
    layer, lane = torch.zeros(ROWS, dtype=torch.int64), torch.arange(ROWS) % NUM_LANES
    for _ in range(steps):
        trainer.step(Batch(rows(ROWS)[0], layer, ROWS, lane=lane))
    if (k := architecture.calibrated_l0) is not None:
        histogram = Histogram(k * len(x), torch.device("cpu"))
        with torch.no_grad():
            histogram.add((sae.standardize(x, 0).u - sae.b) @ sae.W_enc.T)
            sae.get_parameter("threshold").fill_(histogram.threshold(k * len(x)))
    return sae


def active(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """(B, N) True where a latent is active at a row."""
    found = sae.encode(x, 0)
    none = torch.zeros(len(x), sae.config.num_latents, dtype=torch.bool)
    return none.scatter(1, found.indices, found.values != 0)


@pytest.mark.slow
def test_rows_use_as_many_latents_as_they_have_directions() -> None:
    """L0 by row correlates with the number, 2 to 20 among 256; TopK's cannot."""
    generator = torch.Generator().manual_seed(0)
    planted = directions(256, generator)

    def rows(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        count = torch.randint(2, 21, (num_rows,), generator=generator)
        chosen = torch.rand(num_rows, 256, generator=generator).topk(20, dim=1).indices
        size = 1 + torch.rand(num_rows, 20, generator=generator)
        size = size * (torch.arange(20) < count[:, None])
        return torch.bmm(size[:, None], planted[chosen])[:, 0], count

    x, count = rows(4000)
    l0 = active(trained(BatchTopK(11), 256, rows, 600), x).sum(1)
    assert np.corrcoef(l0, count)[0, 1] >= 0.8
    assert l0.double().mean().item() == pytest.approx(11, rel=0.02)
    assert set(active(trained(TopK(11), 256, rows, 10), x).sum(1).tolist()) == {11}


@pytest.mark.slow
def test_the_first_prefix_holds_parents_which_children_do_not_absorb() -> None:
    """A child never comes without its parent; latents of parents are silent less often beside it.

    Absorption is the share of a parent's rows with a child at which the latent nearest to the
    parent is silent.
    """
    generator = torch.Generator().manual_seed(0)
    num_parents, num_children = 16, 6
    parents = directions(num_parents, generator)
    children = directions(num_parents * num_children, generator)
    num_latents = len(parents) + len(children)

    def rows(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (num_rows, num_parents)
        there = torch.rand(shape, generator=generator) < 0.15
        has_child = there & (torch.rand(shape, generator=generator) < 0.7)
        which = torch.randint(num_children, shape, generator=generator)
        sizes = 1 + 0.2 * torch.rand(2, *shape, generator=generator)
        of_children = torch.zeros(*shape, num_children)
        of_children.scatter_(2, which[:, :, None], (has_child * sizes[1])[:, :, None])
        x = (there * sizes[0]) @ parents + of_children.flatten(1) @ children
        return x, has_child

    absorbed, in_prefix = [], []
    for prefixes in (None, (num_parents, num_latents)):
        sae = trained(BatchTopK(4), num_latents, rows, 800, prefixes)
        nearest = (parents @ sae.W_dec.detach().T).argmax(dim=1)
        x, has_child = rows(8000)
        silent = ~active(sae, x)[:, nearest] & has_child
        absorbed.append((silent.sum() / has_child.sum()).item())
        in_prefix.append((nearest < num_parents).double().mean().item())
    print(f"absorbed {absorbed}, parents in the first prefix {in_prefix}")
    assert in_prefix[1] >= 0.8 > in_prefix[0]
    assert absorbed[1] < absorbed[0]
