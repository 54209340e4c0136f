"""One byte flipped at random places: found by verify, and never read as if it were true."""

import hashlib
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlsae.analyze.selection import read_rows
from mlsae.store import StoreError, open_store
from mlsae.store.tools.verify import verify
from mlsae.train.data.loader import Loader
from mlsae.train.data.mixture import Mixture

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

NUM_FLIPS = 200
NUM_PROCESSES = 10
STORES = {
    "float16": ("--encoding", "float16", "--sites", "resid_pre,attn_out"),
    "float32-zstd": ("--encoding", "float32-zstd", "--layers", "1"),
    "int8": ("--encoding", "int8", "--max-encoding-fvu", "0.01"),
    "int8-zstd": (
        "--encoding",
        "int8-zstd",
        "--keep-positions",
        "24",
        "--max-encoding-fvu",
        "0.01",
    ),
}
USES = ("train", "analyze")
TRAIN = ("-R", "4", "-k", "8", "--batch-size", "1024", "--device", "cpu")


@pytest.fixture(scope="module")
def stores(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Harvested stores of every way to hold a value."""
    root = tmp_path_factory.mktemp("flips")

    def make(name: str) -> Path:
        small = ("--max-tokens", "1024", "--shard-size", "16KiB")
        done = kit.Harvest(root / name, options=(*STORES[name], *small)).run()
        assert done.returncode == 0, done.stderr
        return root / name

    return dict(zip(STORES, kit.side_by_side(make, list(STORES)), strict=True))


@contextmanager
def flipped(path: Path, at: int, mask: int) -> Iterator[None]:
    """A file with bits of one byte turned over, until the block ends."""
    data = path.read_bytes()
    harmed = bytearray(data)
    harmed[at] ^= mask
    path.write_bytes(harmed)
    try:
        yield
    finally:
        path.write_bytes(data)


def readings(path: Path) -> dict[str, Callable[[], Any]]:
    """Name of a reading → function that opens the store anew and reads it."""
    store = open_store(path)
    found: dict[str, Callable[[], Any]] = {
        name: lambda name=name: getattr(open_store(path), name)()  # type: ignore[misc]
        for name in ("tokens", "documents", "token_flags", "row_tokens", "row_groups")
    }
    for site in store.sites:
        for layer in store.layers:
            found[f"{site} {layer}"] = lambda at=(site, layer): open_store(path).read(*at)  # type: ignore[misc]
        found[f"train {site}"] = lambda site=site: trained_on(path, site)  # type: ignore[misc]
        found[f"analyze {site}"] = lambda site=site: analyzed(path, site)  # type: ignore[misc]
        found[f"moments {site}"] = lambda site=site: np.concatenate(  # type: ignore[misc]
            [np.ravel(value) for value in vars(open_store(path).moments(site)).values()]
        )
    return found


def trained_on(path: Path, site: str) -> tuple[bytes, int]:
    """All that training is given of a site in an epoch, hashed in order, and its batches."""
    store, none = open_store(path), np.empty(0, np.int64)
    mixture = Mixture.plan(
        store, site, store.layers, batch_rows=300, seed=0, skip_positions=1, validation=none
    )
    digest, num_batches = hashlib.sha256(), 0
    with Loader(mixture, start=0, stop=mixture.epoch_steps) as batches:
        for batch in batches:
            num_batches += 1
            for values in (batch.layer, batch.x, *batch.more):
                digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.digest(), num_batches


def analyzed(path: Path, site: str) -> list[tuple[int, bytes]]:
    """Number and hash of the rows that analysis is given, by layer."""
    store, found = open_store(path), []
    for layer in store.layers:
        digest, num_rows = hashlib.sha256(), 0
        for rows in read_rows(store, site, layer, np.arange(store.num_sequences), 300):
            num_rows += len(rows[0])
            for values in rows:
                digest.update(values.tobytes())
        found.append((num_rows, digest.digest()))
    return found


def attempt(read: Callable[[], Any]) -> tuple[str | None, Any]:
    """The refusal, or what was read."""
    try:
        return None, read()
    except StoreError as error:
        return str(error), None


def same(one: Any, other: Any) -> bool:
    """True if two readings are equal."""
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else bool(one == other)


def places(files: list[Path], generator: random.Random) -> Iterator[tuple[Path, int]]:
    """A file and a byte of it: every other file by its size, the others by their number alone."""
    sizes = [file.stat().st_size for file in files]
    while True:
        for number in (
            generator.choices(range(len(files)), sizes)[0],
            generator.randrange(len(files)),
        ):
            yield files[number], generator.randrange(sizes[number])


def kind_of(name: str) -> str:
    """Kind of a file's content, for the counts."""
    folder = name.split("/")[0]
    if name.endswith("zarr.json"):
        return "metadata"
    if folder in ("activations", "block_exponents", "channel_mean", "channel_scale"):
        return folder.replace("_", " ")
    if folder in ("tokens", "documents", "token_flags", "row_token"):
        return "tokens"
    return "records, moments, card"


def test_every_flip_is_found_and_none_is_read(counts: Any, stores: dict[str, Path]) -> None:
    generator = random.Random(0)
    by_kind: Counter[str] = Counter()
    refused, unharmed = 0, 0
    for path in stores.values():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        ways = readings(path)
        truth = {what: read() for what, read in ways.items()}
        for (file, at), _ in zip(
            places(files, generator), range(NUM_FLIPS // len(stores)), strict=False
        ):
            name = file.relative_to(path).as_posix()
            with flipped(file, at, 1 << generator.randrange(8)):
                problems = [str(problem) for problem in verify(path).problems]
                where = f"byte {at} of {file}"
                assert problems, where
                assert any(name in problem for problem in problems), (where, problems)
                is_activation = kind_of(name) in ("activations", "block exponents")
                for what, read in ways.items():
                    error, values = attempt(read)
                    if is_activation and what in (f"{do} {name.split('/')[1]}" for do in USES):
                        assert error, (where, what)
                    # A shard is named, and so is every file that is read whole.
                    assert error is None or name in error, (where, what, error)
                    assert error or same(values, truth[what]), (where, what)
                    refused += error is not None
                    unharmed += error is None
            by_kind[kind_of(name)] += 1
        assert verify(path).problems == []
    total = sum(by_kind.values())
    assert total == NUM_FLIPS
    counts.add("flips", flips=total, refused=refused, unharmed=unharmed)
    counts.add("flips by kind", **by_kind)


@pytest.fixture(scope="module")
def sae(kit: Any, unbroken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE trained on the store that nothing happened to."""
    out: Path = tmp_path_factory.mktemp("sae") / "sae"
    done = kit.run([*kit.MLSAE, "train", "--cache", unbroken, "--out", out, *TRAIN])
    assert done.returncode == 0, done.stderr
    return out


def test_training_and_analysis_stop_in_one_line_that_names_the_shard(
    kit: Any, counts: Any, unbroken: Path, sae: Path, tmp_path: Path
) -> None:
    """And verify exits 1; no SAE and no analysis is written."""
    generator = random.Random(1)
    shards = sorted(unbroken.glob("activations/*/*/c.*"))
    others = [unbroken / name for name in ("token_flags/c.0", "moments.safetensors", "plan.json")]
    chosen = [*generator.sample(shards, NUM_PROCESSES - len(others)), *others]

    def harm(number: int) -> None:
        name = chosen[number].relative_to(unbroken).as_posix()
        path = tmp_path / f"acts{number}"
        shutil.copytree(unbroken, path)
        size = chosen[number].stat().st_size
        out = tmp_path / f"out{number}"
        with flipped(path / name, random.Random(number).randrange(size), 16):
            train = [*kit.MLSAE, "train", "--cache", path, "--out", out / "sae", *TRAIN]
            kit.assert_refused(kit.run(train), name)
            assert not list(out.rglob("sae.safetensors"))
            assert not list(out.rglob("config.json"))
            analyze = ["analyze", "--cache", path, "--sae", sae, "--rows", "all"]
            done = kit.run([*kit.MLSAE, *analyze, "--out", out / "analysis"])
            line = kit.assert_refused(done, name)
            if (shard := re.search(r"/c\.(\d+)\.0$", name)) is not None:
                assert f"(shard {shard[1]} of activations/resid_post/" in line
            assert not (out / "analysis").exists()
            found = kit.run([*kit.MLSAE, "store", "verify", path])
            assert found.returncode == 1
            assert name in found.stdout
            assert "Traceback" not in found.stderr
        shutil.rmtree(path)

    kit.side_by_side(harm, range(len(chosen)))
    counts.add("flips", train=len(chosen), analyze=len(chosen))
