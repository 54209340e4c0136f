"""Output directories: held by one run, filled whole wherever they lie, and nobody else's."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from mlsae.base.directories import (
    KEPT,
    LOCK,
    content_of,
    has_staged,
    held,
    require_free,
    require_outside_stores,
    staged,
)
from mlsae.base.errors import InputError, ResourceError
from mlsae.base.files import open_partial, remove_stale_partials


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_second_run_is_told_who_holds_the_directory(tmp_path: Path):
    """Also one in this process: the lock belongs to the open file, not to a number of processes."""
    out = tmp_path / "deep" / "out"
    with held(out):
        assert names(out) == [LOCK]
        with pytest.raises(InputError) as raised, held(out):
            pass
    assert re.fullmatch(
        rf"{out} is being written by process {os.getpid()} on \S+ since [\d-]+ [\d:]+ UTC: wait "
        r"until that has ended, or stop it, or give another directory",
        str(raised.value),
    )
    # Nothing was put there, so nothing is left.
    assert names(tmp_path) == []


def test_a_lock_ends_with_its_process(tmp_path: Path):
    """Killed, it leaves the file; the next one takes it."""
    script = (
        "import os, sys; from pathlib import Path; from mlsae.base.directories import held\n"
        "with held(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=False)
    assert names(tmp_path / "out") == [LOCK]
    with held(tmp_path / "out"):
        (tmp_path / "out" / "a").touch()
    assert names(tmp_path / "out") == ["a"]


def test_processes_of_one_plan_share_a_directory(tmp_path: Path):
    """Whoever wants it alone waits for all; the last one takes the file away."""
    with ExitStack() as second:
        with held(tmp_path, shared=True):
            second.enter_context(held(tmp_path, shared=True))
        assert names(tmp_path) == [LOCK]
        with pytest.raises(InputError, match="is being written by process"), held(tmp_path):
            pass
    assert names(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), held(tmp_path / "file" / "out"):
        pass
    # The kernel's own file system takes no new files from anybody.
    with (
        pytest.raises((ResourceError, FileNotFoundError), match="/proc/self/out"),
        held(Path("/proc/self/out")),
    ):
        pass


def test_live_temporary_files_are_left_alone_and_others_go(tmp_path: Path):
    """Numbers of processes say nothing: in another container they are others."""
    live, descriptor = open_partial(tmp_path / "a")
    dead, other = open_partial(tmp_path / "b")
    os.close(other)
    foreign = tmp_path / "notes.partial"
    foreign.touch()
    remove_stale_partials(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([live, foreign])
    assert not dead.exists()
    os.close(descriptor)


def test_a_file_that_a_cleaner_has_in_hand_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Who looks for stale files may lock a new one first, and then removes it."""
    held: list[tuple[Path, int]] = []
    lock, close = fcntl.flock, os.close

    def cleaner_first(fd: int, operation: int) -> None:
        if not held:
            (partial,) = tmp_path.iterdir()
            held.append((partial, os.open(partial, os.O_RDWR)))
            lock(held[0][1], operation)
        lock(fd, operation)

    def then_removed(fd: int) -> None:
        close(fd)
        held[0][0].unlink(missing_ok=True)

    monkeypatch.setattr(fcntl, "flock", cleaner_first)
    monkeypatch.setattr(os, "close", then_removed)
    partial, descriptor = open_partial(tmp_path / "a")
    monkeypatch.undo()
    assert partial.exists()
    assert held[0][0] != partial
    os.close(held[0][1])
    os.close(descriptor)


def test_modes_follow_the_umask(tmp_path: Path):
    before = os.umask(0o002)
    try:
        with staged(tmp_path / "out") as new:
            (new / "folder").mkdir()
            partial, descriptor = open_partial(new / "folder" / "file")
            os.close(descriptor)
            partial.rename(new / "folder" / "file")
            assert (tmp_path / "out" / LOCK).stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "folder" / "file").stat().st_mode & 0o777 == 0o664
    assert (tmp_path / "out" / "folder").stat().st_mode & 0o777 == 0o775


def test_a_folder_that_somebody_stands_in_stays_the_same(tmp_path: Path):
    """`cd out; mlsae analyze --out .`"""
    number = tmp_path.stat().st_ino
    for content in ("old", "new"):
        with staged(tmp_path, "last") as new:
            (new / "last").write_text(content)
            (new / content).touch()
    assert tmp_path.stat().st_ino == number
    assert names(tmp_path) == ["last", "new"]
    assert (tmp_path / "last").read_text() == "new"


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path):
    for name in ("new-0123abcd.partial", "old-0123abcd.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").touch()
    assert has_staged(tmp_path)
    assert content_of(tmp_path) == []
    with staged(tmp_path) as new:
        (new / "a").touch()
    assert names(tmp_path) == ["a"]
    assert not has_staged(tmp_path)


REPLACE = """
import os, signal, sys
from pathlib import Path
from mlsae.base.directories import staged

out, left = Path(sys.argv[1]), int(sys.argv[2])

def count(event, _):
    global left
    if event in ("os.rename", "os.rmdir", "os.remove"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

with staged(out, "last") as new:
    for name in ("both", "last", "new", "inner/new"):
        (new / name).parent.mkdir(exist_ok=True)
        (new / name).write_text("new")
    sys.addaudithook(count)
"""
"""Replaces the content of a directory, and is killed before one of its moves and removals."""


def contents(path: Path) -> dict[str, str]:
    return {str(f.relative_to(path)): f.read_text() for f in path.rglob("*") if f.is_file()}


def test_killed_at_any_move_a_directory_has_the_old_content_or_the_new(tmp_path: Path):
    """Once the next run has begun there, even one that makes nothing."""
    found = []
    for kill in range(100):
        out = tmp_path / str(kill)
        with staged(out, "last") as new:
            for name in ("both", "last", "old", "inner/old"):
                (new / name).parent.mkdir(exist_ok=True)
                (new / name).write_text("old")
        old = contents(out)
        done = subprocess.run([sys.executable, "-c", REPLACE, out, str(kill)], check=False)
        with pytest.raises(KeyboardInterrupt), staged(out, "last"):
            raise KeyboardInterrupt
        assert names(out) == sorted({name.split("/")[0] for name in contents(out)})
        found.append(contents(out))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    assert len(found) > 10
    assert found[-1] == {name.replace("old", "new"): "new" for name in old}
    assert found == sorted(found, key=lambda content: content == found[-1])
    assert [content for content in found if content not in (old, found[-1])] == []
    assert found[0] == old


def test_equal_work_is_given_what_a_stopped_run_kept(tmp_path: Path):
    """Where that run said so; other work clears it away, and it is never published."""
    work, out = "0123abcd" * 8, tmp_path / "out"

    def stop(*kept: str):
        with staged(out, work=work) as new:
            for name in kept:
                (new / name).mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop("a")
    assert not out.exists()
    with pytest.raises(KeyboardInterrupt):
        stop("a", KEPT)
    assert names(out) == ["new-0123abcd.partial"]
    assert content_of(out) == []
    with staged(out, work=work) as new:
        assert names(new) == ["a", KEPT]
    assert names(out) == ["a"]
    with pytest.raises(KeyboardInterrupt):
        stop(KEPT)
    with staged(out, work="other" * 8) as new:
        assert names(new) == []
        (new / "b").touch()
    assert names(out) == ["b"]


MOUNTS = """
import subprocess, sys
from pathlib import Path
from mlsae.base.directories import staged
out = Path(sys.argv[1])
for folder in sys.argv[2].split(","):
    (out / folder).mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", out / folder], check=True)
for content in ("old", "new"):
    with staged(out, "summary") as new:
        (new / "events" / "layer-0").mkdir(parents=True)
        (new / "events" / "layer-0" / content).write_text(content)
        (new / "summary").write_text(content)
found = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
print(found, (out / "summary").read_text())
"""


@pytest.mark.parametrize("where", [".", "events", ".,events"])
def test_mount_points_are_filled(tmp_path: Path, where: str):
    """The directory, a folder in it, or both, each a file system of its own."""
    command = ["unshare", "--mount", sys.executable, "-c", MOUNTS, str(tmp_path / "out"), where]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("needs the right to mount")
    assert done.stdout == "['events/layer-0/new', 'summary'] new\n", done.stderr
    assert done.stderr == ""


def test_content_that_cannot_be_replaced_stays_and_the_new_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second of two entries cannot be moved: the first comes back."""
    with staged(tmp_path, "last") as new:
        (new / "last").write_text("old")
        (new / "b").touch()
    rename = Path.rename

    def refusing(path: Path, target: Path) -> Path:
        if path == tmp_path / "b":
            raise PermissionError(1, "Operation not permitted", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(ResourceError) as raised, staged(tmp_path, "last") as new:
        (new / "last").write_text("new")
    kept = next(path for path in tmp_path.iterdir() if path.name.startswith("finished-"))
    assert str(raised.value) == (
        f"{tmp_path / 'b'} cannot be replaced (Operation not permitted); the new content of "
        f"{tmp_path} is finished and lies in {kept}: move it to a directory of its own"
    )
    assert names(tmp_path) == ["b", kept.name, "last"]
    assert (tmp_path / "last").read_text() == "old"
    assert (kept / "last").read_text() == "new"


def test_outputs_in_a_store_are_refused(tmp_path: Path):
    store = tmp_path / "acts"
    (store / "commits").mkdir(parents=True)
    (store / "plan.json").touch()
    with pytest.raises(InputError) as raised:
        require_outside_stores(store / "deep" / "sae", "--out")
    assert str(raised.value) == (
        f"--out {store}/deep/sae lies in the activation store {store}, which may hold no other "
        f"files: give a place outside it, such as {tmp_path}/acts-sae"
    )
    (tmp_path / "link").symlink_to(store)
    with pytest.raises(InputError, match="lies in the activation store"):
        require_outside_stores(tmp_path / "link" / "sae", "--out")
    # The place of a store itself, and places beside it.
    require_outside_stores(store, "--out")
    require_outside_stores(tmp_path / "sae", "--out")


@pytest.mark.parametrize(
    "name", [".DS_Store", "._notes", "lost+found", ".nfs0001", ".ipynb_checkpoints", "desktop.ini"]
)
def test_what_systems_leave_anywhere_is_no_content(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    assert content_of(tmp_path) == []
    with staged(tmp_path) as new:
        (new / "a").touch()
    assert names(tmp_path) == sorted([name, "a"])


def test_what_is_to_be_removed_must_be_free(tmp_path: Path):
    require_free(tmp_path)
    assert names(tmp_path) == []
    with held(tmp_path, shared=True), pytest.raises(InputError, match="is being written by"):
        require_free(tmp_path)


def test_a_file_system_without_locks_is_said_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """As Lustre without the option flock: one line, and the run goes on."""

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refuse)
    with held(tmp_path / "out"):
        (tmp_path / "out" / "a").touch()
    assert names(tmp_path / "out") == ["a"]
    (line,) = [record.message for record in caplog.records]
    assert line == (
        f"{tmp_path / 'out'} lies on a file system without locks (Function not implemented): see "
        "to it that no other run writes there"
    )
