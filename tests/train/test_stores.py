"""Trained from stores elsewhere, and from several stores as one."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlsae.base.errors import InputError
from mlsae.base.files import Location
from mlsae.sae import load
from mlsae.store import Calibrator, NotAStoreError, Store, create, open_corpus, open_store
from mlsae.store.read.split import validation_of
from mlsae.train import TrainConfig, run
from mlsae.train.data.loader import Loader
from mlsae.train.data.mixture import Mixture
from mlsae.train.running.evaluate import evaluate

Cache = Location | tuple[Location, ...]
SETTINGS: dict[str, Any] = {
    "num_latents": 64,
    "k": 4,
    "batch_size": 60,
    "lr": 3e-3,
    "validation_fraction": 0.1,
}


def write(
    path: Path, seed: int, num_sequences: int, layers: tuple[int, ...] = (0, 2), **options: Any
) -> Path:
    """A store of random rows of its own text; position 0 is an outlier."""
    generator = np.random.default_rng(seed)
    num_tokens = 16 * num_sequences
    tokens = generator.integers(0, 100, num_tokens)
    scale = np.where(np.arange(num_tokens) % 16 == 0, 30.0, 1.0)[:, None]
    values = generator.normal(size=(len(layers), num_tokens, 12)) * scale + seed
    rows = {("resid_post", n): x.astype(np.float32) for n, x in zip(layers, values, strict=True)}
    if options.get("encoding") == "int8":
        calibrator = Calibrator(rows, 12)
        calibrator.add(rows)
        options["calibration"] = calibrator.result()
    with create(
        path,
        tokens=tokens,
        context_length=16,
        layers=layers,
        d_model=12,
        token_flags=(tokens < 5).astype(np.uint8),
        **options,
    ) as writer:
        kept = writer.row_tokens(0, writer.num_rows)
        writer.append({key: x[kept] for key, x in rows.items()})
    return path


def run_in(root: Path, name: str, cache: Cache, **more: Any) -> Path:
    settings = {**SETTINGS, "device": "cpu", "cache_dir": root / "kept", **more}
    return run(TrainConfig(cache=cache, out=root / "runs" / name, **settings)).directory


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Path]:
    """`train("name", cache, …)`: the directory of a finished run."""
    return partial(run_in, tmp_path)


@dataclass(frozen=True)
class Home:
    """Two stores of one corpus, and the SAEs of each and of both."""

    a: Path
    b: Path
    of_a: Path
    of_b: Path
    of_both: Path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """37 and 21 sequences, cut differently."""
    root = tmp_path_factory.mktemp("home")
    a = write(root / "a", 0, 37, batch_sequences=4, shard_bytes=4000)
    b = write(root / "b", 1, 21, batch_sequences=1, shard_bytes=2000)
    runs = (run_in(root, "a", a), run_in(root, "b", str(b)), run_in(root, "both", (a, b)))
    return Home(a, b, *runs)


def sae_bytes(directory: Path) -> bytes:
    return (directory / "sae.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["web", "s3", "hub"])
def test_a_remote_store_gives_the_sae_of_the_local_one(
    kind: str,
    home: Home,
    serve: Callable[[str, Path], str],
    train: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Byte for byte, with its record; its chunks are kept on this machine."""
    remote = train("remote", serve(kind, home.a))
    assert sae_bytes(remote) == sae_bytes(home.of_a)
    records = [load(directory).training_record for directory in (home.of_a, remote)]
    for record in records:
        record.pop("environment")
    assert records[0] == records[1]
    assert sum(1 for path in (tmp_path / "kept").rglob("*") if path.is_file()) > 10


def test_nothing_is_kept_of_a_remote_store_if_asked(
    home: Home, serve: Callable[[str, Path], str], train: Callable[..., Path], tmp_path: Path
) -> None:
    remote = train("remote", serve("web", home.a), cache_size=0)
    assert sae_bytes(remote) == sae_bytes(home.of_a)
    assert not (tmp_path / "kept").exists()


def test_a_file_url_is_the_directory(home: Home, train: Callable[..., Path]) -> None:
    assert sae_bytes(train("url", f"file://{home.a}")) == sae_bytes(home.of_a)


def test_an_address_without_a_store_is_one_line(
    home: Home, serve: Callable[[str, Path], str], train: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(NotAStoreError, match=r"http://.*/absent is not an activation store") as e:
        train("out", serve("web", home.a).replace("/a", "/absent"))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "runs").exists()


def test_a_corpus_is_trained_on_in_any_order_of_its_stores(
    home: Home, serve: Callable[[str, Path], str], train: Callable[..., Path]
) -> None:
    """One on a server too; the record names the corpus and its stores."""
    assert sae_bytes(train("turned", (home.b, home.a))) == sae_bytes(home.of_both)
    assert sae_bytes(train("remote", (serve("web", home.b), home.a))) == sae_bytes(home.of_both)
    assert sae_bytes(home.of_a) != sae_bytes(home.of_both)
    record, corpus = load(home.of_both).training_record, open_corpus([home.a, home.b])
    ids = sorted(open_store(path).store_id for path in (home.a, home.b))
    assert record["store_id"] == record["settings"]["store_id"] == corpus.store_id
    assert (
        corpus.store_id
        == hashlib.sha256(json.dumps(ids, separators=(",", ":")).encode()).hexdigest()
    )
    assert [one["store_id"] for one in record["stores"]] == ids
    assert sorted(one["num_sequences"] for one in record["stores"]) == [21, 37]
    assert record["validation"] == {
        "fraction": 0.1,
        "seed": 0,
        "num_sequences": 58,
        "num_held_out": 6,
        "num_equal_sequences": 0,
        "share_of_documents": 0.0,
        "num_shared_documents": 0,
    }


def test_the_rows_held_out_of_a_corpus_are_those_held_out_of_its_stores(home: Home) -> None:
    """Counted, in training and in the summary."""
    whole, *alone = (
        load(directory).training_record for directory in (home.of_both, home.of_a, home.of_b)
    )
    for of in ("position_0_out", "position_0_in"):
        assert whole["metrics"][of]["num_rows"] == sum(r["metrics"][of]["num_rows"] for r in alone)
    epochs = [record["position"]["epoch_rows"] for record in alone]
    assert whole["position"]["epoch_rows"] == sum(epochs)


def joined(path: Path, stores: Sequence[Store]) -> Path:
    """One float32 store of the decoded rows of several, in their order."""
    first = stores[0]
    with create(
        path,
        tokens=np.concatenate([store.tokens() for store in stores]),
        context_length=first.context_length,
        layers=first.layers,
        d_model=first.d_model,
        token_flags=np.concatenate([store.token_flags() for store in stores]),
        encoding="float32",
    ) as writer:
        writer.append(
            {
                ("resid_post", n): np.concatenate([store.read("resid_post", n) for store in stores])
                for n in first.layers
            }
        )
    return path


@pytest.mark.parametrize("encoding", ["float32", "int8"])
def test_a_corpus_trains_as_one_store_of_the_same_rows_would(
    encoding: str, train: Callable[..., Path], tmp_path: Path
) -> None:
    """Without rows held out, which are chosen by store; batches meet across the borders.

    Stores of int8 have scales of their own.
    """
    paths = tuple(
        write(tmp_path / str(seed), seed, 30, encoding=encoding, compression=compression)
        for seed, compression in enumerate(("none", "zstd", "none"))
    )
    corpus = open_corpus(paths)
    one = joined(tmp_path / "one", corpus.stores)
    found, expected = (
        load_file(train(name, cache, validation_fraction=0.0) / "sae.safetensors")
        for name, cache in (("found", paths), ("expected", one))
    )
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5)
    sae = load(tmp_path / "runs/found")
    metrics = [
        evaluate(
            sae,
            store,
            "resid_post",
            (0, 2),
            np.arange(0, 90, 7),
            skip_positions=1,
            rank=0,
            world_size=1,
            sum_over_ranks=lambda tensor: tensor,
        )["position_0_out"]["layers"]
        for store in (corpus, open_store(one))
    ]
    for of_corpus, of_one in zip(*metrics, strict=True):
        assert of_corpus == pytest.approx(of_one, rel=1e-4)


def test_every_row_of_a_corpus_of_kept_positions_is_met_once(tmp_path: Path) -> None:
    """But for those that are flagged, skipped or held out of their stores; each with its layer."""
    corpus = open_corpus(
        [write(tmp_path / f"{n}", n, 30, keep_positions=5, keep_seed=n) for n in range(2)]
    )
    held_out = validation_of(corpus, 0.2, 0)
    mixture = Mixture.plan(
        corpus, "resid_post", (0, 2), batch_rows=20, seed=0, skip_positions=3, validation=held_out
    )
    met: list[list[list[float]]] = [[], []]
    with Loader(mixture, start=0, stop=mixture.epoch_steps) as batches:
        for batch in batches:
            for layer, row in zip(batch.layer.tolist(), batch.x.tolist(), strict=True):
                met[layer].append(row)
    trained = corpus.eligible(3) & ~np.isin(np.arange(300) // 5, held_out)
    for found, layer in zip(met, (0, 2), strict=True):
        assert sorted(found) == sorted(corpus.read("resid_post", layer)[trained].tolist())


def test_stores_that_are_no_corpus_are_refused_and_nothing_is_made(
    home: Home, train: Callable[..., Path], tmp_path: Path
) -> None:
    other = write(tmp_path / "other", 2, 9, layers=(0, 1))
    with pytest.raises(
        InputError, match=r"cannot be read as one: layers \[0, [12]\] and \[0, [12]\]\."
    ):
        train("out", (home.a, other))
    with pytest.raises(InputError, match="hold the same text: give one of them"):
        train("out", (home.a, home.a))
    small = write(tmp_path / "small", 3, 1)
    with pytest.raises(InputError, match=r"small: validation fraction .* leaves none to train on"):
        train("out", (home.a, small))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_ranks_read_remote_stores_and_only_one_speaks(
    home: Home,
    serve: Callable[[str, Path], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two real processes, a server, a cache that cannot be made: one warning, one summary."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "file").touch()
    flags: dict[str, Any] = {**SETTINGS, "device": "cpu", "out": tmp_path / "two"}
    flags["cache-dir"] = tmp_path / "file/cache"
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    words += [f"--cache={cache}" for cache in (home.a, serve("web", home.b))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", "-m", "mlsae", "train", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SAE: ") == done.stdout.count("dead: ") == 1
    assert done.stderr.count("file/cache cannot be written (Not a directory)") == 1
    expected = load_file(home.of_both / "sae.safetensors")
    for name, values in load_file(tmp_path / "two/sae.safetensors").items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-2, atol=1e-3)
