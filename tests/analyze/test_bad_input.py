"""Mistakes that users make with an analysis, through the command line."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from mlsae.analyze import load
from mlsae.analyze.measure.directions import BLOCK, block_size
from mlsae.base.errors import ResourceError
from mlsae.base.files import read_sealed, seal
from mlsae.cli import main


def command(*arguments: object) -> Result:
    """Run `mlsae` with these arguments in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def analyze(world: Any, sae: Path, out: Path, *more: object) -> Result:
    words = ("--cache", world.store, "--sae", sae, "--out", out, "--no-figures")
    return command("analyze", *words, *more)


def refused(result: Result, message: str, absent: Path | None = None) -> None:
    """One line on stderr with the message, exit status 1, and nothing made."""
    assert result.exit_code == 1, result.output
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output
    if absent is not None:
        assert list(absent.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_in": 20}, ": the SAE's d_in is 20, the store's d_model 16"),
        ({"site": "mlp_out"}, ": the SAE was trained on site mlp_out, the store holds resid_post"),
        (
            {"layers": [0, 2, 7]},
            ": the SAE was trained on layers 0, 2, 7, of which the store lacks 2, 7; it holds 0, "
            "1, 3",
        ),
        (
            {"model_fingerprint": "f" * 64},
            ": the SAE was trained on activations of transformer ffffffffffff, the store holds",
        ),
    ],
)
def test_a_store_and_an_sae_that_do_not_match(
    world: Any,
    sae_maker: Callable[..., Path],
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    sae = sae_maker(world.store, **change)
    where = f"the SAE {sae} does not match the store {world.store}"
    refused(analyze(world, sae, tmp_path / "out"), where + message, tmp_path)


def test_another_store_is_a_warning(
    world: Any, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    """Before the work begins, and on the page."""
    other = {"store_id": "d" * 64, "tokens_sha256": "e" * 64}
    sae = sae_maker(world.store, store_id="d" * 64, stores=[other])
    done = analyze(world, sae, tmp_path / "out")
    assert done.exit_code == 0, done.output
    first, second, *_ = done.stderr.splitlines()
    assert first.startswith(
        "warning: the SAE was trained from store dddddddddddd and is analyzed on store "
    )
    assert second.startswith("warning: the text of store ")
    page = (tmp_path / "out/index.html").read_text("utf-8")
    assert first.removeprefix("warning: ") in page


def test_a_transformer_that_is_not_the_recorded_one(
    world: Any, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    """Refused if it was named; otherwise all else is measured, and it says why not that."""
    other = tmp_path / "other"
    shutil.copytree(world.model, other)
    tensors = load_file(other / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    sae = sae_maker(world.store)
    (tmp_path / "empty").mkdir()
    named = analyze(world, sae, tmp_path / "empty/out", "--model", other)
    message = "is not the one this store was harvested from: expected weights with SHA-256 "
    refused(named, f"model {other} {message}", tmp_path / "empty")
    kept = world.model.with_name("kept")
    world.model.rename(kept)
    shutil.copytree(other, world.model)
    try:
        found = analyze(world, sae, tmp_path / "out")
    finally:
        shutil.rmtree(world.model)
        kept.rename(world.model)
    assert found.exit_code == 0, found.output
    line = f"delta CE was not measured: model {world.model} {message}"
    assert line in found.stdout
    assert f"not measured: model {world.model} {message}" in (
        tmp_path / "out/index.html"
    ).read_text("utf-8")


def test_no_transformer_at_hand(world: Any, sae_maker: Callable[..., Path], tmp_path: Path) -> None:
    """Everything but the CE family; a directory that is named and absent is an error."""
    gone = world.model.with_name("gone")
    (tmp_path / "empty").mkdir()
    sae = sae_maker(world.store)
    world.model.rename(gone)
    try:
        named = analyze(world, sae, tmp_path / "empty/out", "--model", world.model)
        refused(named, f"there is no model directory {world.model}", tmp_path / "empty")
        done = analyze(world, sae, tmp_path / "out")
    finally:
        gone.rename(world.model)
    assert done.exit_code == 0, done.output
    reason = f"there is no model directory {world.model}"
    assert f"delta CE was not measured: {reason}" in done.stdout
    found = load(tmp_path / "out")
    for name in ("ce", "delta_ce", "kl", "loss_recovered_zero", "top1_agreement"):
        assert found.layers[name].null_count == len(found.layers)
    for name in ("fvu", "l0", "norm", "dead_fraction"):
        assert found.layers[name].null_count == 0
    assert reason in found.page.read_text("utf-8")


@pytest.fixture(scope="module")
def analysis(
    world: Any, sae_maker: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("bad") / "out"
    done = analyze(world, sae_maker(world.store), out)
    assert done.exit_code == 0, done.output
    # The analyzed store is that of training.
    assert "warning" not in done.stderr
    return out


@pytest.mark.parametrize("latent", ["48", "-1", "99999999999999999999"])
def test_a_latent_out_of_range(analysis: Path, latent: str) -> None:
    done = command("latents", analysis, "--where", f"latent == {latent}")
    refused(done, f"--where: there is no latent {latent}; there are 0 to 47")
    last = command("latents", analysis, "--where", f"latent == 47 or latent == {latent}")
    assert last.exit_code == 0
    assert last.output.splitlines()[-1] == "1 of 48 latents"


def test_a_condition_that_no_latent_meets_is_no_error(analysis: Path) -> None:
    done = command("latents", analysis, "--where", "latent == 3 and density > 2")
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "0 of 48 latents")


def test_an_out_with_something_else(
    world: Any, sae_maker: Callable[..., Path], drawn: Any, tmp_path: Path
) -> None:
    """Everything is left as it was; a whole analysis, page and all, is replaced."""
    sae = sae_maker(world.store)
    analysis, notes = drawn.analysis.path, tmp_path / "notes"
    shutil.copytree(analysis, notes)
    (notes / "notes.md").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for out, message in (
        (notes, "holds an analysis, which would be replaced, and notes.md, which mlsae did not"),
        (world.store, "holds other things than an analysis ("),
        (sae, "holds other things than an analysis (config.json); give a directory that is empty"),
        (analysis / "figures", "holds other things than an analysis ("),
    ):
        before = sorted(out.rglob("*"))
        refused(analyze(world, sae, out), f"--out {out} {message}")
        assert sorted(out.rglob("*")) == before
    of_file = analyze(world, sae, tmp_path / "file")
    assert of_file.exit_code == 2
    assert "is a file" in of_file.stderr
    (notes / "notes.md").unlink()
    (notes / "index.html").write_text("old")
    assert analyze(world, sae, notes).exit_code == 0
    assert (notes / "index.html").read_text("utf-8").startswith("<!doctype html>")


def test_an_analysis_of_another_version(analysis: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(analysis, older)
    summary = read_sealed(older / "summary.json")
    (older / "summary.json").write_bytes(seal({**summary, "tables_version": "0.1"}))
    refused(command("latents", older), f"{older} holds tables of version 0.1, this mlsae reads ")


def test_blocks_of_cosines_shrink_until_they_fit() -> None:
    """At 131,072 latents of 768 channels: 405 MB, and what two blocks take."""
    of_latents = 131_072 * (4 * 768 + 16)
    for block in (BLOCK, 512, 64):
        enough = of_latents + 32 * block**2
        assert block_size(131_072, 768, enough) == block
        if block > 64:
            assert block_size(131_072, 768, enough - 1) == block // 2
    with pytest.raises(ResourceError) as error:
        block_size(131_072, 768, of_latents)
    assert str(error.value) == (
        "not enough memory for the cosines of 131,072 decoder directions: even 64 by 64 at a time "
        "they need 405 MB, 405 MB available; free some memory or use a larger machine"
    )


LIMITED = """
import resource, sys
import numpy as np, psutil, torch
from mlsae.analyze.measure.directions import BLOCK, block_size, check_memory
from mlsae.analyze.measure.directions import decoder_pairs, nearest_rows
from mlsae.base.errors import ResourceError
from mlsae.base.machine.resources import available_memory
torch.set_num_threads(1)
rows = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
means = np.linspace(0, 3, len(rows))
free = decoder_pairs(rows[:64], means[:64], 3, int)
used = psutil.Process().memory_info().vms
for room in (80_000_000, 200_000):
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
    assert available_memory() <= room
    try:
        check_memory(rows)
        print(block_size(*rows.shape, available_memory()) < BLOCK)
        found = decoder_pairs(rows, means, 3, int)
        nearest_rows(rows, rows[:3000])
        print(int(found.counts.sum()), round(found.mmcs, 5))
    except ResourceError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
whole = decoder_pairs(rows, means, 3, int)
print(int(whole.counts.sum()), round(whole.mmcs, 5))
"""


def test_little_memory_for_all_pairs_of_directions() -> None:
    """In a real process with a real limit: smaller blocks, the same figures; or a clear no."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    smaller, found, refusal, whole = done.stdout.splitlines()
    assert smaller == "True"
    assert found == whole
    assert found.startswith(f"{4096 * 4095 // 2} ")
    assert refusal.startswith(
        "not enough memory for the cosines of 4,096 decoder directions: even 64 by 64 at a time "
        "they need 459 kB, "
    )


def test_too_little_disk_for_the_events(
    sample: Any, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    """On a real small file system: estimated before any work, and nothing is left there.

    Nor is transformers imported, since the store names no transformer.
    """
    if shutil.which("unshare") is None:
        pytest.skip("needs the unshare command to mount a small file system")
    (tmp_path / "transformers.py").write_text("raise SystemExit('transformers was imported')")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = (
        f"mount -t tmpfs -o size=64k tmpfs '{disk}' && \"$@\"; code=$?; ls -A '{disk}'; exit $code"
    )
    prefix = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    words = ["analyze", "--cache", sample.path, "--sae", sae_maker(sample.path), "--rows", "all"]
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "mlsae", *map(str, words), "--out", str(disk / "out")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: not enough disk for the table of events at ")
    assert "B free; lower --max-tokens or choose another --out" in line
