"""Objects that are cut short, gone, too many, or in one another's place: of every kind."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsae.store import StoreError, open_store
from mlsae.store.tools.verify import verify

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def stores(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Harvested stores that have every kind of object between them."""
    root = tmp_path_factory.mktemp("objects")
    choices = [
        ("--sites", "resid_pre,resid_post", "--keep-positions", "16"),
        ("--encoding", "int8", "--max-encoding-fvu", "0.01"),
        ("--encoding", "float16-zstd", "--layers", "0,1"),
    ]

    def make(number: int) -> Path:
        small = ("--max-tokens", "1088", "--shard-size", "16KiB")
        done = kit.Harvest(root / f"acts{number}", options=(*choices[number], *small)).run()
        assert done.returncode == 0, done.stderr
        return root / f"acts{number}"

    return list(kit.side_by_side(make, range(len(choices))))


def kind_of(name: str) -> str:
    """Objects that differ in site, layer or number alone are of one kind; first and last apart."""
    return re.sub(r"resid_\w+|(?<=/)\d+(?=/)|(?<=/)[0-9a-f]{32}", "*", name)


def one_of_each_kind(path: Path) -> dict[str, Path]:
    """Kind → a file of it."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    found = {kind_of(file.relative_to(path).as_posix()): file for file in files}
    # Shards and their records: the first, one in the middle and the last, which is short.
    last = len(list(path.glob("commits/[0-9]*.json"))) - 1
    numbers = re.compile(rf"(c\.|/0*)(0|1|{last})(\.|$)")
    return {
        kind: file
        for kind, file in found.items()
        if not re.search(r"c\.\d+\.0$|\d{5}\.", kind) or numbers.search(kind)
    }


def truth_of(path: Path) -> dict[str, Any]:
    """Everything that is read of a store."""
    store = open_store(path)
    found: dict[str, Any] = {
        "tokens": store.tokens(),
        "documents": store.documents(),
        "flags": store.row_flags(),
        "rows": store.row_tokens(),
    }
    for site in store.sites:
        found[f"moments of {site}"] = store.moments(site).m2
        for layer in store.layers:
            found[f"{site} {layer}"] = store.read(site, layer)
    return found


def assert_found(path: Path, name: str, truth: dict[str, Any], *, swapped: bool = False) -> None:
    """Verify names the object; reading everything is refused, or gives what is true.

    Only verify hashes whole objects: sound chunks in another's place are for it to find.
    """
    try:
        problems = [str(problem) for problem in verify(path).problems]
    except StoreError as error:
        problems = [str(error)]
    # Without the record that completes it a store is incomplete, whatever else there is.
    words = [name, "is incomplete"] if name == "complete.json" else [name]
    assert any(word in problem for problem in problems for word in words), (name, problems)
    try:
        found = truth_of(path)
    except StoreError:
        return
    for what, values in truth.items():
        assert swapped or np.array_equal(found[what], values), (name, what)


def cut_to_half(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def cut_by_one(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def one_more(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"\0")


def test_cut_short_emptied_longer_or_missing(counts: Any, stores: list[Path]) -> None:
    harms: list[Callable[[Path], None]] = [cut_to_half, cut_by_one, emptied, one_more, Path.unlink]
    met = 0
    for path in stores:
        truth = truth_of(path)
        for file in one_of_each_kind(path).values():
            name = file.relative_to(path).as_posix()
            # A card, or a record of a run, may be removed by its owner.
            is_optional = name == "README.md" or name.startswith("provenance/")
            for harm in harms:
                data = file.read_bytes()
                harm(file)
                if not (is_optional and harm == Path.unlink) and not (
                    name == "README.md" and harm == emptied
                ):
                    assert_found(path, name, truth)
                    met += 1
                file.write_bytes(data)
        assert verify(path).problems == []
    counts.add("objects", cut_or_missing=met)


def test_objects_that_do_not_belong(counts: Any, stores: list[Path]) -> None:
    met = 0
    for path in stores:
        truth = truth_of(path)
        extra = [
            "notes.txt",
            "commits/99999.json",
            "moments/99999.safetensors",
            "tokens/c.7",
            "activations/resid_post/zarr.json.bak",
            "activations/resid_post/99/c.0.0",
            "provenance/notes.txt",
            "tokens/c.0.host-1-ab.partial",
        ]
        for name in extra:
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(b"what is this")
            assert_found(path, name, truth)
            (path / name).unlink()
            met += 1
        shutil.rmtree(path / "activations/resid_post/99")
        assert verify(path).problems == []
    counts.add("objects", extra=met)


def pairs(path: Path) -> Iterator[tuple[Path, Path]]:
    """Files of one kind and size, of different content."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for place, one in enumerate(files):
        partners = {
            (other.parent == one.parent): other
            for other in files[place + 1 :]
            if other.stat().st_size == one.stat().st_size
            and re.sub(r"\d+", "", kind_of(other.name)) == re.sub(r"\d+", "", kind_of(one.name))
            and other.read_bytes() != one.read_bytes()
        }
        for other in partners.values():
            yield one, other


def test_two_objects_in_one_anothers_place(counts: Any, stores: list[Path]) -> None:
    """Within a layer and between layers, equally large; records, moments and metadata too."""
    met = 0
    for path in stores:
        truth = truth_of(path)
        for one, other in list(pairs(path)):
            data = one.read_bytes(), other.read_bytes()
            one.write_bytes(data[1])
            other.write_bytes(data[0])
            assert_found(path, one.relative_to(path).as_posix(), truth, swapped=True)
            one.write_bytes(data[0])
            other.write_bytes(data[1])
            met += 1
        assert verify(path).problems == []
    assert met > 20
    counts.add("objects", swapped=met)
