"""PCA beside an SAE's FVU."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch

from mlsae.store import open_store
from mlsae.train.running.baseline import add_pca, pca_fvu
from mlsae.train.running.evaluate import POSITION_0_OUT

HELD_OUT = np.array([3, 4, 20, 36])


def by_hand(fitted: Any, tested: Any, directions: int) -> float:
    """FVU of PCA by numpy's singular vectors, in float64."""
    mean = fitted.mean(axis=0)
    _, _, vectors = np.linalg.svd(fitted - mean, full_matrices=False)
    centred = tested - mean
    left = centred - centred @ vectors[:directions].T @ vectors[:directions]
    return float(np.square(left).sum() / np.square(tested - tested.mean(axis=0)).sum())


def measure(store: Any, world_size: int, skip_positions: int) -> list[Any]:
    """FVU as each of several ranks finds it, a thread each."""
    meeting, given = Barrier(world_size), [torch.empty(0)] * world_size

    def of_rank(rank: int) -> Any:
        def add(part: torch.Tensor) -> torch.Tensor:
            given[rank] = part
            meeting.wait()
            total = torch.stack(given).sum(0)
            meeting.wait()
            return total

        return pca_fvu(
            store,
            "resid_post",
            (1, 3),
            HELD_OUT,
            skip_positions=skip_positions,
            device=torch.device("cpu"),
            rank=rank,
            world_size=world_size,
            sum_over_ranks=add,
        )

    with ThreadPoolExecutor(world_size) as ranks:
        return list(ranks.map(of_rank, range(world_size)))


@pytest.mark.parametrize(("skip_positions", "world_size"), [(0, 1), (1, 2), (5, 3)])
def test_pca_is_that_of_singular_vectors(
    sample_maker: Callable[..., Any], skip_positions: int, world_size: int
):
    """At every number of directions, found on the sequences that are not held out."""
    sample = sample_maker(encoding="float32")
    store = open_store(sample.path)
    position = np.arange(len(sample.tokens)) % 24
    keep = (sample.token_flags == 0) & (position >= max(1, skip_positions))
    out = np.isin(np.arange(len(position)) // 24, HELD_OUT)
    for curves in measure(store, world_size, skip_positions):
        for layer in (1, 3):
            x = sample.activations[layer].astype(np.float64)
            wanted = [by_hand(x[keep & ~out], x[keep & out], r) for r in range(21)]
            np.testing.assert_allclose(curves[layer], wanted, rtol=1e-4, atol=1e-6)
            assert curves[layer][0] > 1


def test_an_sae_is_measured_against_as_many_directions_as_it_has_active_latents():
    """k of TopK; the L0 of each layer where an architecture has no such number."""
    curve = np.array([1.0, 0.6, 0.4, 0.2, 0.0])
    entries = [{"layer": 0, "l0": 1.6}, {"layer": 1, "l0": 200.0}, {"layer": 2, "l0": None}]
    metrics: dict[str, Any] = {POSITION_0_OUT: {"layers": entries}}
    fvu = {0: curve, 1: curve, 2: np.full(5, np.nan)}
    add_pca(metrics, fvu, 3)
    assert [e["pca_directions"] for e in entries] == [3, 3, 3]
    assert [e["fvu_pca"] for e in entries] == [0.2, 0.2, None]
    add_pca(metrics, fvu, None)
    assert [e["pca_directions"] for e in entries] == [2, 4, 0]
    assert [e["fvu_pca"] for e in entries] == [0.4, 0.0, None]
