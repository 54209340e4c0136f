"""Checkpoints that stay, and the one from which a run of several SAEs goes on."""

from pathlib import Path

from mlsae.train.running.checkpoint import Checkpoints, common_step


def make(directory: Path, *steps: int, keep: int = 2) -> Checkpoints:
    """A directory as whole checkpoints after these steps leave it, but for what is in them."""
    directory.mkdir()
    for step in steps:
        for suffix in ("safetensors", "json"):
            (directory / f"step-{step:010d}.{suffix}").touch()
    return Checkpoints(directory, keep)


def test_the_last_ones_stay(tmp_path: Path) -> None:
    """And nothing that was never finished."""
    found = make(tmp_path / "a", 3, 20, 100, keep=2)
    (tmp_path / "a/step-0000000101.safetensors").touch()
    (tmp_path / "a/step-0000000102.partial").touch()
    (tmp_path / "a/.tmpXKUv9w").touch()
    assert found.steps() == [3, 20, 100]
    found.prune()
    assert found.steps() == [20, 100]
    assert len(list((tmp_path / "a").iterdir())) == 4


def test_later_ones_than_a_run_goes_on_from_are_removed(tmp_path: Path) -> None:
    """Else one that is kept could be of a step that other SAEs never come by."""
    found = make(tmp_path / "a", 3, 20, 100)
    found.remove(after=20)
    assert found.steps() == [3, 20]
    found.remove(after=0)
    assert found.steps() == []
    found.remove()
    assert not (tmp_path / "a").exists()


def test_several_saes_go_on_from_the_last_step_of_all(tmp_path: Path) -> None:
    """From the start, if there is none."""
    a, b = make(tmp_path / "a", 3, 20, 100), make(tmp_path / "b", 3, 20)
    assert common_step([a]) == 100
    assert common_step([a, b]) == 20
    assert common_step([a, b, make(tmp_path / "c")]) == 0
