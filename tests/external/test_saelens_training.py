"""SAELens trains SAEs of the same architectures on the same rows of one layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mlsae.sae import SAE, load
from mlsae.sae.formats.convert import import_sae
from mlsae.store import create
from mlsae.train import TrainConfig, run

pytestmark = [
    pytest.mark.external,
    pytest.mark.timeout(3000),  # Environments may have to be installed.
]

D, N, L0, STEPS, BATCH = 64, 192, 6, 1000, 1024
SEQUENCES, CONTEXT = 3000, 64


def planted(num_rows: int, seed: int) -> npt.NDArray[np.float32]:
    """Rows of 2 to 10 of 192 directions and noise, of mean square length near D."""
    rng = np.random.default_rng(7)
    directions = rng.normal(size=(N, D))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    counts = rng.integers(2, 11, num_rows)
    rank = rng.random((num_rows, N)).argsort(axis=1)
    sizes = np.where(rank < counts[:, None], rng.gamma(4, 0.75, (num_rows, N)), 0)
    x = sizes @ directions + 0.1 * rng.normal(size=(num_rows, D)) + 0.3
    return x.astype(np.float32)


def measured(sae: SAE, x: torch.Tensor) -> tuple[float, float]:
    """L0 and FVU at layer 0."""
    with torch.no_grad():
        latents = sae.encode(x, 0)
        error = (x - sae.decode(latents)).double().square().sum()
        l0 = (latents.values != 0).sum(dim=-1).double().mean()
    return float(l0), float(error / (x - x.mean(dim=0)).double().square().sum())


def fvu_at(sae: SAE, x: torch.Tensor, l0: float) -> float:
    """FVU once one factor for all thresholds has brought L0 there."""
    first = sae.weights["threshold"].detach().clone().clamp(min=1e-3)
    low, high = 0.0, 1e4
    for _ in range(40):
        factor = (low * high) ** 0.5 if low else high / 10
        sae.weights["threshold"].data.copy_(first * factor)
        low, high = (factor, high) if measured(sae, x)[0] > l0 else (low, factor)
    reached, fvu = measured(sae, x)
    assert abs(reached / l0 - 1) < 0.01
    return fvu


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("batchtopk", {"k": L0}),
        pytest.param(
            "jumprelu",
            {"target_l0": L0},
            marks=pytest.mark.xfail(
                strict=True,
                reason="FVU 0.29 against 0.16 of SAELens at L0 6.1 on rows of 2 to 10 latents",
            ),
        ),
    ],
)
def test_fvu_is_no_worse_than_saelens(
    kind: str, settings: dict[str, Any], peer: Callable[..., str], tmp_path: Path
) -> None:
    """At equal rows, latents, steps and L0, against the best of several settings of theirs."""
    x = planted(SEQUENCES * CONTEXT, 0)
    with create(
        tmp_path / "acts",
        tokens=np.random.default_rng(2).integers(0, 1000, len(x)),
        context_length=CONTEXT,
        layers=(0,),
        d_model=D,
        encoding="float32",
    ) as writer:
        writer.append({("resid_post", 0): x})
    ours = run(
        TrainConfig(
            cache=tmp_path / "acts",
            out=tmp_path / "sae",
            architecture=kind,
            num_latents=N,
            batch_size=BATCH,
            max_rows=STEPS * BATCH,
            normalize="scale",
            device="cpu",
            **settings,
        )
    )
    held_out = torch.from_numpy(planted(5_000, 1))
    sae = load(ours.directory)
    l0, fvu = measured(sae, held_out)
    assert abs(l0 / L0 - 1) < 0.05
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "theirs").mkdir()
    peer("saelens_training", tmp_path / "x.npy", tmp_path / "theirs", kind, L0, N, STEPS, BATCH)
    reached = {}
    for directory in sorted((tmp_path / "theirs").iterdir()):
        found = import_sae(directory, tmp_path / f"imported-{directory.name}")
        reached[directory.name] = fvu_at(found, held_out, l0)
    print(f"{kind}: L0 {l0:.2f}, FVU {fvu:.4f}, SAELens {reached}")
    assert fvu <= 1.02 * min(reached.values())
