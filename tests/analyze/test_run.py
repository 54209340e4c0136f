"""A whole analysis: what it leaves, what it says, and what it refuses."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlsae.analyze import AnalyzeConfig, load, run
from mlsae.analyze.results.figures.registry import FIGURES
from mlsae.analyze.results.records import describe
from mlsae.analyze.results.text.summary import render
from mlsae.base.errors import InputError, ResourceError
from mlsae.sae import SAE, SAEConfig, TopK
from mlsae.store import IncompleteStoreError, create, open_store
from mlsae.store.read.split import validation_sequences
from mlsae.train import TrainConfig
from mlsae.train import run as train

PICTURES = sorted(f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg"))
TABLES = (
    "histograms",
    "latent_layers",
    "latents",
    "layer_cosine",
    "layers",
    "overall",
    "prefixes",
    "prompts",
)


def _tree(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def _first_row(world: Any) -> int:
    plan = open_store(world.store).plan
    held_out = validation_sequences(plan.tokens_sha256, 37, 0.2, 3)
    return 24 * int(held_out[0])


def test_an_analysis_is_complete_and_says_what_it_found(world: Any, drawn: Any) -> None:
    found, text, out = drawn.analysis, drawn.printed, drawn.analysis.path
    assert _tree(out) == [
        *(f"events/layer-{n}/part-{_first_row(world):012d}.parquet" for n in (0, 1, 3)),
        "examples.parquet",
        *(f"figures/{name}" for name in PICTURES),
        *sorted([*(f"{name}.parquet" for name in TABLES), "index.html", "summary.json"]),
    ]
    lines, layers = text.splitlines(), found.layers.to_pylist()
    head = lines.index("layer     FVU  delta CE   L0  dead latents")
    events, num_latents = found.events.to_table().to_pylist(), len(found.latents)
    for row, line in zip(layers, lines[head + 1 :], strict=False):
        used = {event["latent"] for event in events if event["layer"] == row["layer"]}
        dead = num_latents - len(used)
        assert line.split() == [
            str(row["layer"]),
            f"{row['fvu']:.4f}",
            f"{row['delta_ce']:.3f}",
            f"{row['l0']:.1f}",
            str(dead),
            f"({dead / num_latents:.1%})",
        ]
    dead = found.latents["dead"].to_pylist().count(True)
    assert lines[head + 4 :] == [
        f"{sum(row['num_rows'] for row in layers)} rows of 7 sequences (validation), "
        "positions from 1",
        "FVU: 0 is perfect, 1 the mean",
        f"delta CE: nats a token beside the model's {layers[0]['ce']:.4f}, over "
        f"{layers[0]['num_ce_tokens']} tokens",
        f"dead latents: used by no such row of the layer; at every layer: {dead} of {num_latents} "
        f"({dead / num_latents:.1%})",
        f"examples have token ids and no text: {found.summary['examples']['no_text_because']}",
        "",
        f"page      {out / 'index.html'}",
        f"tables    {out}/*.parquet",
        f"events    {out / 'events'} ({describe(found.summary['events'])})",
        f"figures   {out / 'figures'} ({len(FIGURES)})",
        f"examples  mlsae examples {out} LATENT",
    ]


@pytest.mark.parametrize("same_rows", [True, False])
def test_pca_of_training_stands_beside_on_the_same_rows(
    same_rows: bool, world: Any, tmp_path: Path
) -> None:
    """Training measures it on the held-out rows; on others it would compare with nothing."""
    trained = train(
        TrainConfig(
            cache=world.store,
            out=tmp_path / "sae",
            num_latents=32,
            k=3,
            batch_size=64,
            device="cpu",
        )
    )
    assert trained.metrics is not None
    entries = trained.metrics["position_0_out"]["layers"]
    found = run(
        AnalyzeConfig(
            figures=False,
            cache=world.store,
            sae=tmp_path / "sae",
            out=tmp_path / "out",
            rows="validation" if same_rows else "train",
        )
    )
    wanted = [(3, entry["fvu_pca"]) if same_rows else (None, None) for entry in entries]
    columns = (found.layers[name].to_pylist() for name in ("pca_directions", "fvu_pca"))
    assert list(zip(*columns, strict=True)) == wanted
    text = render(found)
    assert ("PCA: FVU of 3 principal directions" in text) is same_rows
    assert ("   PCA" in text) is same_rows


def test_provenance_is_in_every_file(
    world: Any, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    directory = sae_maker(world.store)
    found = run(
        AnalyzeConfig(figures=False, cache=world.store, sae=directory, out=tmp_path / "out")
    )
    store = open_store(world.store)
    for table in (found.layers, found.latents, found.latent_layers, found.events):
        metadata = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
        assert metadata["mlsae.store_id"] == store.store_id
        assert metadata["mlsae.plan_id"] == store.plan_id
        assert metadata["mlsae.sae_sha256"] == found.summary["sae_sha256"]
        assert table.schema.field(0).metadata[b"unit"]
    assert found.summary["model_fingerprint"] == store.source["model"]["fingerprint"]


def test_rows_tokens_and_events_are_limited_as_asked(
    world: Any, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    found = run(
        AnalyzeConfig(
            figures=False,
            cache=world.store,
            sae=sae_maker(world.store, skip_positions=0),
            out=tmp_path / "out",
            rows="train",
            max_tokens=10 * 24 + 5,
            ce_max_tokens=3 * 24,
            events_max_tokens=5 * 24 + 23,
        )
    )
    assert found.summary["num_sequences"] == 10
    trained = [n for n in range(37) if n in _train_sequences(world)][:10]
    rows = (world.flags == 0).reshape(37, 24)[trained].sum()
    assert found.layers["num_rows"].to_pylist() == [rows] * 3
    events = np.unique(found.events.to_table()["row"].to_numpy()) // 24
    assert trained[5] == trained[4] + 1
    assert sorted(set(events.tolist())) == trained[:5]
    assert 0 < found.layers["num_ce_tokens"][0].as_py() <= 3 * 23


def _train_sequences(world: Any) -> set[int]:
    plan = open_store(world.store).plan
    return set(range(37)) - set(validation_sequences(plan.tokens_sha256, 37, 0.2, 3).tolist())


def test_a_latent_planted_at_one_layer_has_no_layer_variance(tmp_path: Path) -> None:
    """Layer l holds multiples of its own direction, and latent l reads just that direction."""
    generator = np.random.default_rng(0)
    directions = np.linalg.qr(generator.normal(size=(12, 12)))[0]
    directions -= directions.mean(axis=1, keepdims=True)
    layers = (2, 5, 9)
    with create(
        tmp_path / "acts", tokens=np.arange(60), context_length=10, layers=layers, d_model=12
    ) as writer:
        for _ in range(6):
            size = generator.uniform(1, 3, size=(10, 1))
            batch = {("resid_post", n): size * directions[i] for i, n in enumerate(layers)}
            writer.append({key: x.astype(np.float32) for key, x in batch.items()})
    sae = SAE(SAEConfig(d_in=12, num_latents=4, architecture=TopK(1)))
    with torch.no_grad():
        sae.W_dec.copy_(torch.from_numpy(directions[:4]))
        sae.normalize_decoder()
        sae.W_enc.copy_(sae.W_dec)
    store = open_store(tmp_path / "acts")
    record = {
        "store_id": store.store_id,
        "model_fingerprint": None,
        "site": "resid_post",
        "layers": layers,
        "skip_positions": 1,
        "validation": {"fraction": 0.2, "seed": 0},
    }
    sae.save(tmp_path / "sae", record)
    found = run(
        AnalyzeConfig(
            figures=False,
            cache=tmp_path / "acts",
            sae=tmp_path / "sae",
            out=tmp_path / "out",
            rows="all",
        )
    )
    assert found.latents["layer_mean"].to_pylist() == [2.0, 5.0, 9.0, None]
    assert found.latents["layer_var"].to_pylist() == [0.0, 0.0, 0.0, None]
    assert found.latents["count"].to_pylist() == [54, 54, 54, 0]
    assert found.latents["dead"].to_pylist() == [False, False, False, True]
    assert found.layers["l0"].to_pylist() == [1.0, 1.0, 1.0]
    assert max(found.layers["fvu"].to_pylist()) < 1e-4


def test_without_a_transformer_all_but_the_ce_family_is_there(
    world: Any,
    sae_maker: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = sae_maker(world.store)
    gone = world.model.with_name("gone")
    world.model.rename(gone)
    try:
        found = run(
            AnalyzeConfig(figures=False, cache=world.store, sae=directory, out=tmp_path / "out")
        )
        text = capsys.readouterr().out
        moved = run(
            AnalyzeConfig(
                figures=False, cache=world.store, sae=directory, out=tmp_path / "moved", model=gone
            )
        )
    finally:
        gone.rename(world.model)
    assert "delta CE was not measured: there is no model dir" in text
    assert " kl" not in text.splitlines()[0]
    for name in ("num_ce_tokens", "ce", "ce_store", "ce_sae", "delta_ce", "kl"):
        assert found.layers[name].null_count == 3
        assert moved.layers[name].null_count == 0
    assert found.layers["fvu"].equals(moved.layers["fvu"])
    assert "no model directory" in found.summary["no_cross_entropy_because"]
    assert moved.summary["no_cross_entropy_because"] is None


def test_a_transformer_with_other_weights_is_refused(
    world: Any, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    """Named with --model it is an error; found where the store's was, it is left alone."""
    other, kept = tmp_path / "other", world.model.with_name("kept")
    shutil.copytree(world.model, other)
    tensors = load_file(other / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    settings: dict[str, Any] = {"cache": world.store, "sae": sae_maker(world.store)}
    message = "is not the one this store was harvested from: expected "
    with pytest.raises(InputError, match=message):
        run(AnalyzeConfig(figures=False, **settings, out=tmp_path / "out", model=other))
    assert not (tmp_path / "out").exists()
    world.model.rename(kept)
    shutil.copytree(other, world.model)
    try:
        found = run(AnalyzeConfig(figures=False, **settings, out=tmp_path / "out"))
    finally:
        shutil.rmtree(world.model)
        kept.rename(world.model)
    assert found.layers["delta_ce"].null_count == 3
    assert message in found.summary["no_cross_entropy_because"]


def test_a_model_that_is_given_and_cannot_be_used_is_an_error(
    world: Any, sample: Any, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    absent = tmp_path / "absent" / "model"
    with pytest.raises(InputError, match=r"there is no model directory .*absent/model"):
        run(
            AnalyzeConfig(
                figures=False,
                cache=world.store,
                sae=sae_maker(world.store),
                out=tmp_path / "out",
                model=absent,
            )
        )
    with pytest.raises(InputError, match=r"--model .*: the store records no transformer; leave"):
        run(
            AnalyzeConfig(
                figures=False,
                cache=sample.path,
                sae=sae_maker(sample.path),
                out=tmp_path / "out",
                model=world.model,
            )
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_in": 20}, "does not match the store .*: the SAE's d_in is 20, the store's d_model 16"),
        ({"site": "mlp_out"}, "trained on site mlp_out, the store holds resid_post"),
        (
            {"layers": [0, 2, 3, 7]},
            "trained on layers 0, 2, 3, 7, of which the store lacks 2, 7; it holds 0, 1, 3",
        ),
        (
            {"model_fingerprint": "f" * 64},
            "was trained on activations of transformer ffffffffffff, the store holds those of ",
        ),
        (
            {"model_fingerprint": None},
            "transformer that was not recorded, the store holds those of ",
        ),
        ({"validation": {"fraction": 0.0, "seed": 0}}, "no validation rows: use --rows all"),
    ],
)
def test_an_sae_that_does_not_match_the_store_is_refused(
    world: Any,
    sae_maker: Callable[..., Path],
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    config = AnalyzeConfig(
        figures=False, cache=world.store, sae=sae_maker(world.store, **change), out=tmp_path / "out"
    )
    with pytest.raises(InputError, match=message) as caught:
        run(config)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_store_of_the_same_transformer_is_analyzed_and_named(
    world: Any,
    sae_maker: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = {"store_id": "d" * 64, "tokens_sha256": "e" * 64}
    directory = sae_maker(world.store, store_id="d" * 64, stores=[other])
    found = run(
        AnalyzeConfig(figures=False, cache=world.store, sae=directory, out=tmp_path / "out")
    )
    text = capsys.readouterr().out
    here = open_store(world.store).store_id[:12]
    assert (
        f"note: the SAE was trained from store dddddddddddd and is analyzed on store {here}" in text
    )
    assert f"note: the text of store {here} is not that of training: the rows evaluated" in text
    assert len(found.summary["notes"]) == 2


def test_an_sae_that_no_training_made_is_refused(world: Any, tmp_path: Path) -> None:
    SAE(SAEConfig(d_in=16, num_latents=8, architecture=TopK(2))).save(
        tmp_path / "sae", {"site": "resid_post"}
    )
    config = AnalyzeConfig(
        figures=False, cache=world.store, sae=tmp_path / "sae", out=tmp_path / "out"
    )
    with pytest.raises(
        InputError, match=r"its training.json lacks layers, model_fingerprint, skip"
    ):
        run(config)


def test_rows_of_which_none_is_eligible_are_refused(
    sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    tokens = np.arange(40)
    with create(
        tmp_path / "acts",
        tokens=tokens,
        context_length=8,
        layers=(0,),
        d_model=4,
        token_flags=np.full(40, 2, np.uint8),
    ) as writer:
        for _ in range(5):
            writer.append({("resid_post", 0): np.ones((8, 4), np.float32)})
    config = AnalyzeConfig(
        figures=False,
        cache=tmp_path / "acts",
        sae=sae_maker(tmp_path / "acts"),
        out=tmp_path / "out",
        rows="all",
    )
    with pytest.raises(InputError, match="none of the 40 rows chosen is eligible"):
        run(config)


def test_stores_and_outputs_that_cannot_be_used_are_refused_before_any_work(
    world: Any, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    directory = sae_maker(world.store)
    partial = tmp_path / "partial"
    shutil.copytree(world.store, partial)
    (partial / "complete.json").unlink()
    with pytest.raises(IncompleteStoreError):
        run(AnalyzeConfig(figures=False, cache=partial, sae=directory, out=tmp_path / "out"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds other things than an analysis"):
        run(AnalyzeConfig(figures=False, cache=world.store, sae=directory, out=tmp_path / "mine"))
    assert _tree(tmp_path / "mine") == ["thesis.tex"]
    assert not (tmp_path / "out").exists()


def test_a_damaged_chunk_stops_the_analysis_and_leaves_nothing(
    world: Any, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    damaged = tmp_path / "acts"
    shutil.copytree(world.store, damaged)
    for shard in (damaged / "activations" / "resid_post" / "3").glob("c.*"):
        data = bytearray(shard.read_bytes())
        data[7] ^= 1
        shard.write_bytes(data)
    config = AnalyzeConfig(
        figures=False, cache=damaged, sae=sae_maker(world.store), out=tmp_path / "out", rows="all"
    )
    with pytest.raises(InputError, match="resid_post/3"):
        run(config)
    assert [path.name for path in tmp_path.iterdir()] == ["acts"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_absent_is_refused(
    world: Any, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    config = AnalyzeConfig(
        figures=False,
        cache=world.store,
        sae=sae_maker(world.store),
        out=tmp_path / "out",
        device="cuda",
    )
    with pytest.raises(ResourceError, match="no usable CUDA device; use --device cpu"):
        run(config)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rows": "test"}, "--rows must be validation or train or all, got 'test'"),
        ({"max_tokens": 0}, "--max-tokens must be at least 1, got 0"),
        ({"batch_size": -4}, "--batch-size must be at least 1, got -4"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AnalyzeConfig(figures=False, cache=Path("a"), sae=Path("b"), out=Path("c"), **setting)


def test_load_refuses_what_is_damaged(
    world: Any, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(AnalyzeConfig(figures=False, cache=world.store, sae=sae_maker(world.store), out=out))
    assert load(str(out)).latents.equals(pq.read_table(out / "latents.parquet"))
    (out / "latents.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        InputError, match=r"the analysis .*/out is damaged .* make it again with mls"
    ):
        load(out)
