"""Removing a store takes a store and nothing else, and never leaves what passes for one."""

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlsae.base.files import seal
from mlsae.cli import main
from mlsae.store import IncompleteStoreError, StoreError, open_store
from mlsae.store.tools.remove import find_removable, remove

KILLED = """
import os, signal, sys
from mlsae.store.tools.remove import find_removable, remove

left = int(sys.argv[2])
def count(event, _):
    global left
    if event in ("os.remove", "os.rmdir"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
found = find_removable(sys.argv[1])
sys.addaudithook(count)
remove(found)
"""


def rm(*arguments: object, answer: str = "") -> Result:
    """`mlsae store rm` in this process."""
    return CliRunner().invoke(main, ["store", "rm", *map(str, arguments)], input=answer)


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything below a path."""
    return {
        str(entry.relative_to(path)): None if entry.is_dir() else entry.read_bytes()
        for entry in path.rglob("*")
    }


def refused(result: Result, message: str) -> None:
    """One line, exit status 1."""
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("\n") == 1, result.output


def test_a_store_is_removed_when_the_user_says_so(sample):
    """The question says what it is and its size; anything but yes keeps it."""
    before = tree(sample.path)
    kept = rm(sample.path, answer="n\n")
    assert kept.exit_code == 1
    assert kept.output.startswith(
        f"remove {sample.path}: complete store of 888 tokens, resid_post of layers 0–1, 3 in "
        f"float16, "
    )
    assert "kB? [y/N]: n\nAborted!" in kept.output
    assert rm(sample.path).exit_code == 1  # Nobody there to answer.
    assert tree(sample.path) == before
    removed = rm(sample.path, answer="y\n")
    assert removed.exit_code == 0
    assert removed.output.splitlines()[-1].startswith(f"removed {sample.path}: complete store of ")
    assert not sample.path.exists()


def test_every_kind_of_store_is_removed(sample_maker, monkeypatch):
    """Kept positions, compression, provenance, files of hubs; from within; by a file URL."""
    made = sample_maker("a", keep_positions=24, compression="zstd", provenance={"host": "x"})
    (made.path / ".gitattributes").touch()
    (made.path / "activations/resid_post/0/c.7.0.host-1-ab.partial").touch()
    (made.path / "complete.json").unlink()
    shown = rm("--yes", made.path.as_uri())
    assert shown.output.startswith(f"removed {made.path}: incomplete store of 888 tokens")
    assert not made.path.exists()
    other = sample_maker("b")
    monkeypatch.chdir(other.path)
    assert rm("--yes", ".").exit_code == 0
    assert not other.path.exists()


@pytest.mark.parametrize("harm", ["damaged plan", "older version", "begun", "nothing but a plan"])
def test_what_can_no_longer_be_read_can_be_removed(sample, harm):
    """Because it is told by its names."""
    plan = sample.path / "plan.json"
    if harm == "damaged plan":
        plan.write_bytes(b"?" + plan.read_bytes()[1:])
    elif harm == "older version":
        plan.write_bytes(seal({"schema_version": "0.2", "layers": None, "sites": 3}))
    else:
        shutil.rmtree(sample.path / "activations")
        for name in ("complete.json", "zarr.json", "README.md", "moments.safetensors"):
            (sample.path / name).unlink()
        if harm == "nothing but a plan":
            for folder in [entry for entry in sample.path.iterdir() if entry.is_dir()]:
                shutil.rmtree(folder)
    assert rm(sample.path, "--yes").exit_code == 0
    assert not sample.path.exists()


def test_what_is_no_store_is_refused(tmp_path: Path):
    """Absent, a file, a directory of other things, somebody else's plan.json, a place elsewhere."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/plan.json").write_text('{"plan": "to conquer the world"}')
    (tmp_path / "thesis.tex").write_text("precious")
    before = tree(tmp_path)
    for location, message in (
        (tmp_path / "absent", "absent is not an activation store: it has no plan.json; nothing"),
        (tmp_path / "thesis.tex", "thesis.tex is not an activation store: it has no plan.json"),
        (tmp_path, "is not an activation store: it has no plan.json; nothing was removed"),
        (
            tmp_path / "notes",
            "notes is not an activation store: its plan.json is not the plan of a store",
        ),
        ("s3://bucket/acts", "s3://bucket/acts is not on this machine; remove it with the tools"),
    ):
        refused(rm("--yes", location), message)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (["notes.txt"], "notes.txt"),
        (["activations/mine.npy", "tokens/c.0.bak"], "activations/mine.npy, tokens/c.0.bak"),
        ([".git/HEAD"], ".git, .git/HEAD"),
        (["tokens/c.0/inner"], "tokens/c.0, tokens/c.0/inner"),
        (["sae/"], "sae"),
        ([f"{i}.txt" for i in range(8)], "0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 3 more"),
    ],
)
def test_a_store_with_foreign_files_is_left_alone(sample, made, named):
    """They are named, and nothing is removed."""
    for name in made:
        path = sample.path / name
        if path.parent.is_file():
            path.parent.unlink()
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text("precious")
    before = tree(sample.path)
    refused(
        rm("--yes", sample.path),
        f"{sample.path} holds other files than those of a store: {named}; nothing was removed",
    )
    assert tree(sample.path) == before


def test_links_are_removed_and_what_they_point_at_is_not(sample, tmp_path: Path):
    """A file kept elsewhere stays; a folder elsewhere, or a link to the store, is refused."""
    shard = sample.path / "activations/resid_post/0/c.0.0"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "blob").write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(elsewhere / "blob")
    (tmp_path / "link").symlink_to(sample.path)
    refused(rm("--yes", tmp_path / "link"), f"link is a link to {sample.path}; give that directory")
    layer = sample.path / "activations/resid_post/1"
    shutil.move(layer, elsewhere / "1")
    layer.symlink_to(elsewhere / "1")
    refused(rm("--yes", sample.path), "those of a store: activations/resid_post/1; nothing")
    layer.unlink()
    shutil.move(elsewhere / "1", layer)
    assert rm("--yes", sample.path).exit_code == 0
    assert [path.name for path in elsewhere.iterdir()] == ["blob"]


def test_a_killed_removal_leaves_what_is_visibly_incomplete(sample, tmp_path: Path):
    """At every instant: no reader takes it for complete, no harvest takes data for safe that is
    gone, and it can be removed again."""
    steps = len(tree(sample.path)) + 1
    generator = random.Random(0)
    last = [steps - 2, steps - 1]
    for left in sorted({0, 1, *generator.sample(range(3, steps), 3), *last}):
        copy = tmp_path / "copy"
        shutil.copytree(sample.path, copy)
        command = [sys.executable, "-c", KILLED, str(copy), str(left)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert len(tree(copy)) == steps - 1 - left
        if left == steps - 1:
            assert list(copy.iterdir()) == []
            copy.rmdir()
            continue
        if left:
            with pytest.raises((IncompleteStoreError, StoreError)):
                open_store(copy)
            for record in copy.glob("commits/[0-9]*.json"):
                shard = int(record.stem)
                assert (copy / f"activations/resid_post/3/c.{shard}.0").exists()
                assert (copy / f"moments/{record.stem}.safetensors").exists()
        remove(find_removable(copy))
        assert not copy.exists()
