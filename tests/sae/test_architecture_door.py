"""An architecture of one file, which no other file knows: trained, resumed, analyzed, converted."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from mlsae.base.errors import InputError
from mlsae.cli import main
from mlsae.sae import SAE, Architecture, SAEConfig, TopK, load
from mlsae.sae.architectures import TopKSettings, base, get, register
from mlsae.sae.architectures.base import Weights
from mlsae.sae.formats.convert import export_sae
from mlsae.sae.kernels.functions import preactivations
from mlsae.sae.kernels.sparse import Support
from mlsae.store import open_store
from mlsae.train import TrainConfig, run
from mlsae.train.step.trainer import Trainer


@dataclass(frozen=True)
class AbsTopK(Architecture):
    """The k latents of largest |a|, with their signs."""

    name = "abstopk"
    summary = "the k of largest magnitude"
    settings = TopKSettings
    revival = None

    k: int

    @classmethod
    def wanted(cls, settings: TopKSettings) -> "AbsTopK":
        return cls(settings.k)

    @property
    def most_active(self) -> int:
        return self.k

    def activate(
        self,
        u_BD: torch.Tensor,
        weights: Weights,
        at: torch.Tensor | int | None,  # noqa: ARG002
    ) -> tuple[torch.Tensor, Support]:
        W_enc, b = weights["W_enc"], weights["b"]
        with torch.no_grad():
            pre_BN = (u_BD - b) @ W_enc.T
            indices_BK = pre_BN.abs().topk(self.k, dim=1).indices
        support = Support(indices_BK, len(W_enc))
        return preactivations(u_BD, W_enc, b, pre_BN.gather(1, indices_BK), support), support


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register AbsTopK for the tests of this file alone."""
    monkeypatch.setattr(base, "_registered", dict(base._registered))
    register(AbsTopK)


SETTINGS: dict[str, Any] = {
    "architecture": "abstopk",
    "k": 4,
    "num_latents": 64,
    "batch_size": 60,
    "lr": 3e-3,
    "validation_fraction": 0.1,
    "device": "cpu",
}


class StopError(Exception):
    """Ends a run in the middle."""


@pytest.fixture
def trained(sample: Any, tmp_path: Path) -> Path:
    return run(TrainConfig(cache=sample.path, out=tmp_path / "sae", **SETTINGS)).directory


@pytest.fixture
def dense(trained: Path, sample: Any) -> dict[int, np.ndarray]:
    """Layer → every latent of every row by definition, in float64."""
    weights = {n: t.double().numpy() for n, t in load_file(trained / "sae.safetensors").items()}
    found = {}
    store = open_store(sample.path)
    for layer in store.layers:
        x = store.read("resid_post", layer).astype(np.float64)
        u = (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-5)
        z = (u - weights["b"]) @ weights["W_enc"].T
        z[np.abs(z) < np.sort(np.abs(z), axis=1)[:, -4, None]] = 0
        found[layer] = z
    return found


def test_it_is_saved_and_loaded_under_its_name(trained: Path, sample: Any) -> None:
    """With its k, unit decoder rows and signed values; half of them below 0."""
    content = json.loads((trained / "config.json").read_text())
    assert (content["architecture"], content["k"]) == ("mlsae/abstopk", 4)
    record = json.loads((trained / "training.json").read_text())["settings"]
    assert (record["architecture"], record["k"]) == ("abstopk", 4)
    sae = load(trained)
    assert sae.architecture == AbsTopK(4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    values = sae.encode(torch.from_numpy(sample.activations[0])).values
    assert (values != 0).all()
    assert 0.2 < float((values < 0).float().mean()) < 0.8


def test_training_learns_and_counts_signed_values(trained: Path) -> None:
    """FVU falls; L0 is k."""
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    assert lines[-1]["l0"] == pytest.approx(4)
    for entry in load(trained).training_record["metrics"]["position_0_out"]["layers"]:
        assert entry["l0"] == pytest.approx(4)
        assert entry["fvu"] < 0.8


def test_a_stopped_run_goes_on_exactly(
    trained: Path, sample: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint has all that the parameters of AbsTopK need."""
    config: dict[str, Any] = {"cache": sample.path, "out": tmp_path / "run", **SETTINGS}
    original = Trainer.step

    def failing(self: Trainer, batch: Any) -> Any:
        if self.step_number == 11:
            raise StopError
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", failing)
        with pytest.raises(StopError):
            run(TrainConfig(**config, checkpoint_seconds=0))
    again = run(TrainConfig(**config, resume=True)).directory
    for name, tensor in load_file(trained / "sae.safetensors").items():
        assert torch.equal(tensor, load_file(again / "sae.safetensors")[name]), name


def invoke(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_line_trains_it(trained: Path, sample: Any, tmp_path: Path) -> None:
    """The SAE that the command trains is equal to that of the functions."""
    out = tmp_path / "by-command"
    flags = "--architecture abstopk -k 4 --num-latents 64 --batch-size 60 --lr 3e-3 --device cpu"
    invoke(
        "train", "--cache", sample.path, "--out", out, *flags.split(), "--validation-fraction", 0.1
    )
    for name, tensor in load_file(trained / "sae.safetensors").items():
        assert torch.equal(tensor, load_file(out / "sae.safetensors")[name]), name


def events_of(tables: Iterator[Path]) -> dict[tuple[int, int, int], float]:
    columns = ("row", "layer", "latent", "value")
    found = {}
    for path in tables:
        table = pq.ParquetFile(path).read(columns)
        rows = zip(*(table.column(name).to_pylist() for name in columns), strict=True)
        found |= {(row, layer, latent): value for row, layer, latent, value in rows}
    return found


def test_an_analysis_holds_signed_events_and_sizes(
    trained: Path, dense: dict[int, np.ndarray], sample: Any, tmp_path: Path
) -> None:
    """Events have the sign; what tables add up is |z|."""
    out = tmp_path / "analysis"
    invoke(
        *("analyze", "--cache", sample.path, "--sae", trained, "--out", out),
        *("--rows", "all", "--no-figures", "--device", "cpu"),
    )
    found = events_of(out.rglob("layer-*/*.parquet"))
    rows = sorted({row for row, _, _ in found})
    expected = {
        (row, layer, latent): z[row, latent]
        for layer, z in dense.items()
        for row in rows
        for latent in np.flatnonzero(z[row]).tolist()
    }
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[at] for at in expected], list(expected.values()), rtol=1e-3)
    assert min(found.values()) < -0.1
    layers = pq.read_table(out / "layers.parquet").to_pylist()
    for entry in layers:
        assert entry["l0"] == pytest.approx(4)
        sizes = np.abs(dense[entry["layer"]][rows])
        assert entry["l1"] == pytest.approx(sizes.sum(1).mean(), rel=1e-4)
    sizes = np.abs([z[rows] for z in dense.values()])
    for entry in pq.read_table(out / "latents.parquet").to_pylist():
        mine = sizes[:, :, entry["latent"]]
        assert entry["count"] == (mine > 0).sum()
        assert entry["mean"] == pytest.approx(mine[mine > 0].mean(), rel=1e-4)
    examples = pq.read_table(out / "examples.parquet").to_pylist()
    strongest = max(examples, key=lambda entry: entry["value"])
    assert strongest["value"] == pytest.approx(sizes.max(), rel=1e-3)


def test_no_format_has_a_place_for_it(trained: Path, tmp_path: Path) -> None:
    """Refused by its name: nothing approximate is written."""
    with pytest.raises(
        InputError, match="has architecture abstopk, and that format can hold only topk and"
    ):
        export_sae(trained, "saelens", tmp_path / "out")


def test_what_it_cannot_do_is_refused_before_anything_is_written(
    sample: Any, tmp_path: Path
) -> None:
    """A precision, and a setting of another architecture."""
    for change, message in (
        (
            {"precision": "bfloat16"},
            "--precision bfloat16 is for --architecture topk; abstopk take",
        ),
        ({"l1": 0.1}, "--l1 belongs to --architecture relu or gated, got abstopk"),
    ):
        with pytest.raises(InputError, match=message):
            run(TrainConfig(cache=sample.path, out=tmp_path / "out", **SETTINGS | change))
    assert not (tmp_path / "out").exists()


def test_two_architectures_have_two_names() -> None:
    """A second one would be taken for the first in every file."""
    with pytest.raises(ValueError, match="there is an architecture 'topk' already"):
        register(type("Other", (TopK,), {}))
    assert get("topk") is TopK
    assert SAE(SAEConfig(d_in=4, num_latents=8, architecture=AbsTopK(2))).b_enc is None
