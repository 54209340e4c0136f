"""An exact copy has every byte and the same store_id, wherever it comes from and goes."""

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlsae.base.files import read_sealed, seal
from mlsae.cli import main
from mlsae.store import (
    DamagedStoreError,
    IncompleteStoreError,
    InvalidStoreError,
    NotAStoreError,
    PlanMismatchError,
    StoreError,
    open_store,
)
from mlsae.store.copying.copy import CopyConfig, CopyResult, copy
from mlsae.store.schema import is_provenance
from mlsae.store.tools.verify import verify

SIGNALLED = """
import os, signal, sys
from mlsae.store.copying.copy import CopyConfig, copy

number, left, source, target = signal.Signals[sys.argv[1]], int(sys.argv[2]), *sys.argv[3:5]
def count(event, args):
    # Every file that is begun and every one that gets its name.
    global left
    if event in ("open", "os.rename") and str(args[0]).startswith(target):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)
sys.addaudithook(count)
from mlsae.cli import main
main(["store", "copy", source, target, *sys.argv[5:]])
"""


def copied(source: object, target: object, **options: Any) -> CopyResult:
    """Copy with these settings."""
    return copy(CopyConfig(source=str(source), target=str(target), **options))


def command(*arguments: object) -> Result:
    """`mlsae store copy` in this process."""
    return CliRunner().invoke(main, ["store", "copy", *map(str, arguments)])


def files(path: Path) -> dict[str, bytes]:
    """Name → bytes of every file."""
    return {
        str(entry.relative_to(path)): entry.read_bytes()
        for entry in path.rglob("*")
        if entry.is_file()
    }


def signalled(
    number: str, left: int, source: Path, target: Path, *options: str
) -> "subprocess.CompletedProcess[str]":
    """Copy in a process of its own that sends itself a signal at its `left`-th file."""
    command = [sys.executable, "-c", SIGNALLED, number, str(left), str(source), str(target)]
    return subprocess.run([*command, *options], capture_output=True, text=True, check=False)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Callable[[str, Path], str]:
    """Put a store where a kind of server serves it: its location."""

    def put(kind: str, path: Path) -> str:
        server = request.getfixturevalue(kind)
        if kind == "web":
            shutil.copytree(path, server.root / "mine")
            return f"{server.url}/mine"
        if kind == "s3":
            server.upload(path, "mine")
            return "s3://bucket/mine"
        shutil.copytree(path, server.hub.root / "datasets/someone/mine")
        return "hf://datasets/someone/mine"

    return put


@pytest.mark.parametrize(
    "options",
    [
        {"provenance": {"host": "here"}, "num_sequences": 40},
        {"encoding": "bfloat16", "compression": "zstd", "keep_positions": 24},
    ],
)
def test_a_copy_has_every_byte_and_the_same_id(sample_maker, tmp_path, options):
    """Records, card and provenance too; the last line says so."""
    source = sample_maker(**options).path
    done = command(source, tmp_path / "deep/copy")
    store_id = open_store(source).store_id
    assert files(tmp_path / "deep/copy") == files(source)
    assert open_store(tmp_path / "deep/copy").store_id == store_id
    assert re.fullmatch(
        rf"copied {source} to {tmp_path}/deep/copy: \d+ rows of each of 3 layers in "
        rf"b?float16(-zstd)?, [\d.]+ kB in \d+\.\d s, store_id {store_id[:12]} as before\n",
        done.output,
    )


def test_what_is_there_is_not_copied_again(sample, tmp_path):
    """A whole copy is left alone; of a part of one, only the rest is written."""
    target = tmp_path / "copy"
    copied(sample.path, target)
    for name in files(target):
        os.utime(target / name, (0, 0))
    assert "it was there already" in copied(sample.path, target).line
    lost = {"complete.json", "commits/00002.json", "activations/resid_post/1/c.2.0"}
    for name in lost:
        (target / name).unlink()
    copied(sample.path, target)
    written = {name for name in files(target) if (target / name).stat().st_mtime > 0}
    # Other objects of the shard that has no record are held against it, and kept.
    assert written == {"plan.json", "README.md", *lost}
    assert files(target) == files(sample.path)


def test_a_copy_that_is_killed_goes_on(sample, tmp_path):
    """At several instants of writing, one after another; what is left never passes for a store."""
    target = tmp_path / "copy"
    generator = random.Random(0)
    kept = 0
    for left in (1, 100, *(generator.randrange(5, 30) for _ in range(2))):
        assert signalled("SIGKILL", left, sample.path, target).returncode == -signal.SIGKILL
        with pytest.raises(StoreError) as refused:
            open_store(target)
        assert isinstance(refused.value, IncompleteStoreError | NotAStoreError)
        records = list(target.glob("commits/[0-9]*.json"))
        assert len(records) >= kept
        kept = len(records)
        for record in records:
            for name, digest in read_sealed(record)["objects"].items():
                assert hashlib.sha256((target / name).read_bytes()).hexdigest() == digest
    assert kept > 0
    copied(sample.path, target)
    assert files(target) == files(sample.path)


@pytest.mark.parametrize("kind", ["web", "s3", "hub"])
def test_a_store_elsewhere_is_copied_here(sample_maker, tmp_path, place, kind):
    """Every byte; a web server lists nothing, so it cannot say what provenance it has."""
    source = sample_maker("source", provenance={"host": "here"}, compression="zstd").path
    done = command(place(kind, source), tmp_path / "copy")
    assert done.exit_code == 0, done.output
    expected = files(source)
    if kind == "web":
        assert "provenance was not copied: " in done.stderr
        assert "a web server does not list what it holds" in done.stderr
        expected = {k: v for k, v in expected.items() if not k.startswith("provenance/")}
    assert files(tmp_path / "copy") == expected
    assert not list((tmp_path / "copy").rglob("*.partial"))


def test_a_store_is_copied_to_a_bucket_and_back(sample_maker, tmp_path, s3):
    """Data before the record that vouches for it; the line says how to check it there."""
    source = sample_maker("source", provenance={"host": "here"}).path
    done = command(source, "s3://bucket/copied/acts")
    assert done.output.endswith("; check it with: mlsae store verify s3://bucket/copied/acts\n")
    put = [
        name.removeprefix("bucket/copied/acts/")
        for method, name, _ in s3.faults.requests
        if method == "PUT" and name.startswith("bucket/copied/acts/")
    ]
    assert put[0] == "plan.json"
    assert put[-1] == "complete.json"
    for record in (name for name in put if re.fullmatch(r"commits/\w+\.json", name)):
        for name in read_sealed(source / record)["objects"]:
            assert put.index(name) < put.index(record)
    assert verify("s3://bucket/copied/acts").problems == []
    assert "it was there already" in copied(source, "s3://bucket/copied/acts").line
    copied("s3://bucket/copied/acts", tmp_path / "back")
    assert files(tmp_path / "back") == files(source)


def test_a_copy_to_a_bucket_goes_on(sample, s3):
    """Shards with a record there are not put again; an unfinished one is."""
    s3.faults.refused["bucket/acts/activations/resid_post/3/c.2.0"] = 403
    with pytest.raises(StoreError, match=r"3/c\.2\.0 cannot be written: the server answered 403"):
        copied(sample.path, "s3://bucket/acts")
    with pytest.raises(IncompleteStoreError):
        open_store("s3://bucket/acts", cache_bytes=0)
    s3.faults.refused.clear()
    s3.faults.requests.clear()
    copied(sample.path, "s3://bucket/acts")
    put = [name for method, name, _ in s3.faults.requests if method == "PUT"]
    assert "bucket/acts/activations/resid_post/3/c.2.0" in put
    assert not [name for name in put if name.endswith(("c.0.0", "c.1.0", "commits/00001.json"))]
    assert verify("s3://bucket/acts").problems == []


@pytest.mark.parametrize(
    ("kind", "harm"),
    [
        ("local", "flipped"),
        ("local", "truncated"),
        ("local", "longer"),
        ("local", "missing"),
        ("s3", "flipped"),
        ("web", "missing"),
    ],
)
def test_a_damaged_object_stops_the_copy(sample, tmp_path, place, kind, harm):
    """The object is named with its shard and does not arrive; the copy goes on once it is whole."""
    name = "activations/resid_post/1/c.2.0"
    good = (sample.path / name).read_bytes()
    bad = {
        "flipped": good[:100] + bytes([good[100] ^ 1]) + good[101:],
        "truncated": good[:-1],
        "longer": good + b"\0",
    }
    if harm == "missing":
        (sample.path / name).unlink()
    else:
        (sample.path / name).write_bytes(bad[harm])
    target = tmp_path / "copy"
    message = r"1/c\.2\.0 is damaged: its SHA-256 is not that in the record of shard 2; nothing of"
    if harm == "missing":
        message = r"1/c\.2\.0 is missing, but (the store's records name it|named by the record of)"
    with pytest.raises(DamagedStoreError, match=message):
        copied(sample.path if kind == "local" else place(kind, sample.path), target)
    assert name not in files(target)
    assert "commits/00002.json" not in files(target)
    assert not list(target.rglob("*.partial"))
    (sample.path / name).write_bytes(good)
    copied(sample.path, target)
    assert files(target) == files(sample.path)


def test_a_damaged_object_does_not_reach_a_bucket(sample, s3):
    """Objects are hashed before they are sent."""
    shard = sample.path / "activations/resid_post/1/c.2.0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedStoreError, match="is damaged: its SHA-256 is not that in"):
        copied(sample.path, "s3://bucket/acts")
    put = [name for method, name, _ in s3.faults.requests if method == "PUT"]
    assert "bucket/acts/activations/resid_post/1/c.2.0" not in put
    assert "bucket/acts/commits/00002.json" not in put


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("commits/00001.json", None, DamagedStoreError, "commits/00001.json is missing; restore"),
        ("commits/00001.json", {"objects": {}}, InvalidStoreError, "must name every object of its"),
        ("complete.json", {"store_id": 64 * "0"}, InvalidStoreError, "the store_id is not that of"),
        ("complete.json", None, IncompleteStoreError, "incomplete: 5 of 5 shards are committed"),
        ("plan.json", None, DamagedStoreError, "plan.json is missing"),
    ],
)
def test_records_that_do_not_fit_stop_a_copy_before_it_begins(
    sample, tmp_path, name, change, error, message
):
    """Nothing is made then."""
    record = read_sealed(sample.path / name)
    (sample.path / name).unlink()
    if change is not None:
        (sample.path / name).write_bytes(seal({**record, **change}))
    with pytest.raises(error, match=message):
        copied(sample.path, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_source_that_changes_meanwhile_is_noticed(sample_maker, tmp_path, monkeypatch):
    """Another store takes its place while its first shards are being copied."""
    import mlsae.store.copying.target as target_module

    one, other = sample_maker("one").path, sample_maker("other", seed=1).path
    receive = target_module.DirectoryTarget.receive

    def receive_and_swap(self: Any, item: Any, *rest: Any) -> None:
        receive(self, item, *rest)
        if item.name == "activations/resid_post/0/c.1.0":
            one.rename(tmp_path / "away")
            other.rename(one)

    monkeypatch.setattr(target_module.DirectoryTarget, "receive", receive_and_swap)
    with pytest.raises(DamagedStoreError, match=r"changed while the store was|is damaged: its"):
        copied(one, tmp_path / "copy")
    with pytest.raises(IncompleteStoreError):
        open_store(tmp_path / "copy")


def test_another_store_at_the_target_is_left_alone(sample_maker, tmp_path, s3):
    """Another plan; the same plan with other values, complete or not; other files."""
    source = sample_maker("source").path
    s3.upload(sample_maker("there", seed=3, layers=(0, 1, 4)).path, "there")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.tex").write_text("precious")
    other = sample_maker("other", layers=(0, 1)).path
    # Equal text gives an equal plan; the values differ.
    twin = sample_maker("twin").path
    twin_of = files(twin)
    shard = "activations/resid_post/0/c.1.0"
    record = read_sealed(twin / "commits/00001.json")
    record["objects"][shard] = 64 * "a"
    (twin / "commits/00001.json").write_bytes(seal(record))
    (twin / "complete.json").unlink()
    for target, error, message in (
        (other, PlanMismatchError, r"other holds another store \(layers: \[0, 1\] there, \[0, 1,"),
        (twin, PlanMismatchError, r"another store of the same plan: its commits/00001\.json diff"),
        (tmp_path / "notes", NotAStoreError, r"is not empty and holds no store \(it has thesis"),
        ("s3://bucket/there", PlanMismatchError, "s3://bucket/there holds another store"),
        ("s3://bucket/a b/store/activations", NotAStoreError, "is not empty and holds no store"),
    ):
        before = files(target) if isinstance(target, Path) else None
        with pytest.raises(error, match=message):
            copied(source, target)
        assert before is None or files(target) == before
    assert [name for method, name, _ in s3.faults.requests if method == "PUT"] == []
    (twin / "complete.json").write_bytes(
        seal({**read_sealed(source / "complete.json"), "store_id": 64 * "b"})
    )
    with pytest.raises(PlanMismatchError, match=r"same plan: its complete\.json differs"):
        copied(source, twin)
    assert set(files(twin)) == set(twin_of)


def test_places_that_are_one_are_refused(sample, tmp_path, monkeypatch):
    """One place under two names, one inside the other, nothing here, a place that takes nothing."""
    (tmp_path / "link").symlink_to(sample.path)
    monkeypatch.chdir(tmp_path)
    before = files(sample.path)
    for source, target, message in (
        (sample.path, "link", "would be copied to itself; give another directory"),
        (sample.path.as_uri(), "acts/", "would be copied to itself; give another directory"),
        ("acts", "acts/copy", "one of acts and acts/copy lies in the other; give another"),
        ("acts/activations", ".", "one of acts/activations and . lies in the other"),
        ("s3://a/b", "s3://a/b/", "s3://a/b would be copied to itself; give another place"),
        ("acts", "https://host/x", "https://host/x: a web server takes no uploads; copy to a di"),
        ("acts", "hf://datasets/a/b", "hf://datasets/a/b: cannot be written directly; copy to a"),
        ("acts", "ftp://host/x", "ftp://host/x: expected s3://bucket/prefix"),
        ("absent", "copy", "absent does not exist; expected an activation store"),
    ):
        result = command(source, target)
        assert result.exit_code == 1
        assert message in result.output
        assert result.output.count("\n") == 1
    assert files(sample.path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts", "link"]


def test_between_two_places_elsewhere_goes_by_way_of_here(sample, place):
    """One line says so."""
    result = command(place("web", sample.path), "s3://bucket/copied")
    assert result.exit_code == 1
    assert "is on this machine; copy to a directory first, and from there\n" in result.output


def test_links_in_a_store_are_followed(sample, tmp_path):
    """As the hub's own download leaves them; the copy has files of its own."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name, data in files(sample.path).items():
        blob = blobs / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (sample.path / name).unlink()
        (sample.path / name).symlink_to(blob)
    copied(sample.path, tmp_path / "copy")
    assert files(tmp_path / "copy") == files(sample.path)
    assert not any(path.is_symlink() for path in (tmp_path / "copy").rglob("*"))


def test_cards_come_along_as_their_owner_left_them(sample, tmp_path):
    """Edited ones unchanged; one that is damaged or absent is made anew, and equals the first."""
    card = sample.path / "README.md"
    written = card.read_bytes()
    card.write_text("# Ours\n")
    assert copied(sample.path, tmp_path / "edited").notes == ()
    assert (tmp_path / "edited/README.md").read_text() == "# Ours\n"
    card.write_bytes(written[:-20])
    notes = copied(sample.path, tmp_path / "damaged").notes
    assert [note[:50] for note in notes] == [f"README.md was made anew: that of {sample.path}"[:50]]
    assert (tmp_path / "damaged/README.md").read_bytes() == written
    card.unlink()
    assert copied(sample.path, tmp_path / "absent").notes == ()
    assert (tmp_path / "absent/README.md").read_bytes() == written
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/README.md").write_text("# Mine\n")
    copied(sample.path, tmp_path / "kept")
    assert (tmp_path / "kept/README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_asked_to_stop_a_copy_ends_at_whole_files(sample, tmp_path, number):
    """One line says what is safe and how to go on; the same command does."""
    target = tmp_path / "copy"
    done = signalled(number, 70, sample.path, target)
    assert done.returncode == 128 + signal.Signals[number]
    assert "finishing the files in hand, then stopping" in done.stderr
    last = done.stderr.splitlines()[-1]
    found = re.fullmatch(
        rf"stopped: (\d) of 5 shards (?:is|are) safe in {target}; run the same command to go on",
        last,
    )
    assert found, done.stderr
    assert int(found[1]) == len(list(target.glob("commits/[0-9]*.json")))
    assert not list(target.rglob("*.partial"))
    copied(sample.path, target)
    assert files(target) == files(sample.path)


FULL = """
import shutil, sys
from pathlib import Path
from mlsae.base.errors import ResourceError
from mlsae.store.copying.copy import CopyConfig, copy
from mlsae.store.copying.target import DirectoryTarget
from mlsae.store.schema import is_provenance
from mlsae.store.tools.verify import verify

source, disk = sys.argv[1], Path(sys.argv[2])
ballast = disk / "ballast"
target = disk / "copy"

def attempt(room):
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - room))
    try:
        copy(CopyConfig(source=source, target=str(target)))
    except ResourceError as error:
        print(error)
    ballast.unlink()

attempt(60_000)
print(target.exists())
DirectoryTarget.require_room = lambda *_: None  # The disk fills after it was asked.
attempt(60_000)
print("partial files:", len(list(target.rglob("*.partial"))))
attempt(900_000)
print("problems:", verify(target).problems)
"""


def test_a_full_disk_stops_the_copy_and_the_rerun_finishes(sample, tmp_path):
    """Asked before it begins, and met on the way."""
    if shutil.which("unshare") is None:
        pytest.skip("needs the unshare command to mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=3m tmpfs '{disk}' && exec \"$@\""
    command = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    done = subprocess.run(
        [*command, sys.executable, "-c", FULL, str(sample.path), str(disk)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 0, done.stderr
    asked, made, met, *rest = done.stdout.splitlines()
    assert re.fullmatch(
        r"not enough disk for the copy at .*: needs \d+ kB, [\d.]+ kB free; free some, .*",
        asked,
    )
    assert made == "False"
    assert re.fullmatch(r"the disk is full: .* could not be written; what was finished .*", met)
    assert rest == ["partial files: 0", "problems: []"]


@pytest.mark.parametrize(
    ("name", "is_record"),
    [
        ("provenance/0123abcd.json", True),
        ("provenance/one of ours.json", True),
        ("provenance/../../evil.json", False),
        ("provenance/sub/evil.json", False),
        ("provenance/nul\0.json", False),
        ("x/provenance/a.json", False),
        ("provenance/a.json.partial", False),
    ],
)
def test_a_name_that_a_place_lists_is_no_path_outside_the_copy(name, is_record):
    """Anybody may have chosen it."""
    assert is_provenance(name) == is_record
