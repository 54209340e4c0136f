"""Damage is said of damage alone: not of pointers, pages, additions and what systems leave."""

import json
import re
import warnings

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from mlsae.base.errors import InputError
from mlsae.cli import main
from mlsae.sae import SAE, SAEConfig, TopK, load
from mlsae.sae.formats.convert import export_sae, import_sae
from mlsae.store import DamagedStoreError, StoreError, create, open_store
from mlsae.store.copying.copy import CopyConfig, copy
from mlsae.store.tools.verify import verify

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
ROW = "activations/resid_post/1/c.0.0"


@pytest.fixture
def consolidated(sample):
    """A store of which somebody has consolidated the metadata, as for a publication."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(str(sample.path))
    return sample


def test_consolidated_metadata_are_passed_by(consolidated, tmp_path):
    """The store is read and sound, and a copy has the metadata that were recorded."""
    store = open_store(consolidated.path)
    assert store.read("resid_post", 1).shape == (888, 20)
    report = verify(consolidated.path)
    assert report.problems == []
    assert report.notes == ["zarr.json holds consolidated_metadata too, which a tool added"]
    copy(CopyConfig(source=str(consolidated.path), target=str(tmp_path / "copy")))
    assert "consolidated_metadata" not in json.loads((tmp_path / "copy/zarr.json").read_bytes())
    assert verify(tmp_path / "copy").notes == []


def test_damage_beside_consolidated_metadata_is_found(consolidated):
    (consolidated.path / ROW).write_bytes(b"")
    assert any(ROW in problem.path for problem in verify(consolidated.path).problems)


def test_metadata_that_say_something_else_are_damaged(consolidated):
    path = consolidated.path / "zarr.json"
    content = json.loads(path.read_bytes())
    content["attributes"]["mlsae"]["schema_version"] = "1.1"
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedStoreError, match=r"zarr\.json is missing or damaged; restore it"):
        open_store(consolidated.path)


@pytest.mark.parametrize(
    "name", ["plan.json", "tokens/zarr.json", "moments.safetensors", ROW, "commits/setup.json"]
)
def test_a_pointer_in_place_of_an_object_names_its_cure(sample, name, tmp_path):
    (sample.path / name).write_bytes(POINTER)

    def read() -> None:
        store = open_store(sample.path)
        store.moments()
        store.read("resid_post", 1)

    with pytest.raises(StoreError) as raised:
        read()
    text = str(raised.value)
    assert f"{sample.path / name} is a Git LFS pointer in place of the file: run `git lfs" in text
    assert "damaged" not in text
    with pytest.raises(StoreError, match="is a Git LFS pointer in place of the file"):
        copy(CopyConfig(source=str(sample.path), target=str(tmp_path / "copy")))


def test_a_page_in_place_of_an_object_is_called_so(tmp_path, servers):
    """A server that wants a login sends its page with status 200."""
    with servers.serving_files(tmp_path) as web:
        page = b"<!DOCTYPE html>\n<html><title>Log in</title></html>\n" + b" " * 300
        web.replies["acts/plan.json"] = lambda handler: handler.answer(200, page)
        with pytest.raises(StoreError) as raised:
            open_store(f"{web.url}/acts", cache_bytes=0)
    assert str(raised.value) == (
        f"{web.url}/acts/plan.json is a web page in place of the file: check the address, which "
        "may ask for a login, or make it again"
    )


def test_what_systems_leave_is_neither_damage_nor_in_the_way(sample, tmp_path):
    """A store with it is sound and removed; a directory with nothing else is empty."""
    for name in (".DS_Store", "activations/.DS_Store", "._plan.json", "Thumbs.db"):
        (sample.path / name).touch()
    assert verify(sample.path).problems == []
    done = CliRunner().invoke(main, ["store", "rm", str(sample.path), "--yes"])
    assert (done.exit_code, sample.path.exists()) == (0, False), done.output
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".DS_Store").touch()
    (tmp_path / "new" / "lost+found").mkdir()
    shape = {"context_length": 16, "layers": (0,), "d_model": 6}
    with create(tmp_path / "new", tokens=np.arange(16), **shape) as writer:
        writer.append({("resid_post", 0): np.ones((16, 6), np.float32)})
    assert verify(tmp_path / "new").problems == []


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["store", "rm", "", "--yes"], 2),
        (["store", "info", " "], 2),
        (["store", "copy", "acts", ""], 2),
        (["train", "--cache", "acts", "--out", ""], 2),
        (["train", "--cache", "", "--out", "sae"], 2),
        (["analyze", "--cache", "acts", "--sae", "", "--out", "an"], 2),
        (["harvest", "--model", "", "--dataset", "demo", "--out", "acts"], 2),
        (["export", "", "out", "--to", "saelens"], 2),
        (["latents", ""], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_unset_variable_is_no_place(command, status, sample, monkeypatch):
    """An empty path is the current directory to a library of paths."""
    monkeypatch.chdir(sample.path)
    done = CliRunner().invoke(main, command)
    assert done.exit_code == status
    assert "expected a value, got an empty one; is a variable unset?" in done.output
    assert verify(sample.path).problems == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["store", "copy", "acts", "s3:/bucket/a"], "s3:/bucket/a lacks a slash: expected s3://bu"),
        (["store", "info", "https:/host/a"], "https:/host/a lacks a slash: expected https://host"),
        (["train", "--cache", "acts", "--out", "s3://bucket/sae"], "s3://bucket/sae is a URL: exp"),
        (["analyze", "--cache", "a", "--sae", "s", "--out", "https:/h/an"], "https:/h/an is a URL"),
    ],
)
def test_a_url_makes_no_directory_of_its_name(command, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert message in re.sub(r"\s+", " ", done.output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["sae.safetensors", "training.json", "config.json"])
def test_a_pointer_in_place_of_an_sae_names_its_cure(name, tmp_path):
    """As a clone of a repository without `git lfs` has it; for exports of other tools too."""
    config = SAEConfig(d_in=4, num_latents=8, architecture=TopK(k=2))
    SAE(config).save(tmp_path / "sae", {"site": "resid_post", "layers": [0]})
    load(tmp_path / "sae")
    (tmp_path / "sae" / name).write_bytes(POINTER)
    with pytest.raises(InputError, match=rf"{name} is a Git LFS pointer in place of the file: run"):
        load(tmp_path / "sae")


def test_a_pointer_in_place_of_a_foreign_sae_names_its_cure(tmp_path):
    config = SAEConfig(d_in=4, num_latents=8, architecture=TopK(k=2), normalize="none")
    SAE(config).save(tmp_path / "sae", {"site": "resid_post", "layers": [0]})
    (folder,) = export_sae(tmp_path / "sae", "sparsify", tmp_path / "out")
    for path in folder.iterdir():
        content = path.read_bytes()
        path.write_bytes(POINTER)
        with pytest.raises(InputError, match=rf"{path.name} is a Git LFS pointer in place of the"):
            import_sae(folder, tmp_path / "again")
        path.write_bytes(content)
