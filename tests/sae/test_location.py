"""SAEs of the hub, from a real server on the loopback, in a process with a cache of its own."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from mlsae.sae import SAE, load
from mlsae.sae.errors import NotAnSAEError

Make = Callable[..., Path]

ASK = """
import json, sys
import torch
from pathlib import Path
from mlsae.base.errors import InputError
from mlsae.sae import load
from mlsae.sae.formats.convert import import_sae
for what, name, out in json.loads(sys.argv[1]):
    try:
        sae = load(name) if what == "load" else import_sae(name, Path(out))
        torch.manual_seed(0)
        answer = {"sum": float(sae(torch.randn(3, 5, 12)).detach().sum())}
        if what == "import":
            answer["source"] = sae.training_record["imported"]["source"]
    except InputError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""


def hub_module() -> Any:
    path = Path(__file__).resolve().parents[1] / "hub.py"
    spec = importlib.util.spec_from_file_location("loopback_hub", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask(processes: Any, *asked: tuple[str, str, str]) -> list[dict[str, Any]]:
    process = processes.start(ASK, json.dumps(asked))
    assert process.wait() == 0, process.errors
    return [json.loads(line) for line in process.output.splitlines()]


def expected(sae: SAE) -> float:
    torch.manual_seed(0)
    return float(sae(torch.randn(3, 5, 12)).detach().sum())


def test_an_sae_is_loaded_and_imported_from_the_hub(
    make_sae: Make, make_foreign: Make, forking: Any, tmp_path: Path
) -> None:
    """A repository, a folder of one, a commit; then the same with the hub gone, from its cache."""
    models = tmp_path / "hub" / "models" / "someone"
    run = make_sae(tmp_path / "run", "standardize", bias=False)
    shutil.copytree(run, models / "one")
    shutil.copytree(run, models / "many" / "x64-k32")
    for layer in (0, 1):
        make_foreign(models / "theirs" / f"layers.{layer}", "sparsify")
    make_foreign(models / "closed", "saelens")
    make_foreign(models / "published", "mlsae")
    (models / "empty").mkdir()
    (models / "empty" / "README.md").write_text("nothing here")
    module, home = hub_module(), tmp_path / "home"
    with ExitStack() as stack:
        with module.serving(tmp_path / "hub") as hub:
            hub.gated["someone/closed"] = 403
            environment = {**hub.environment(home), "PYTHONWARNINGS": "error"}
            modules = ("mlsae.sae", "mlsae.sae.formats.convert", "huggingface_hub")
            processes = stack.enter_context(forking.importing(*modules, environment=environment))
            one, theirs = (module.revision_of(models / name) for name in ("one", "theirs"))
            asked = {
                "load": ("someone/one", ""),
                "pinned": (f"someone/one@{one}", ""),
                "folder": ("someone/many/x64-k32", ""),
                "import": ("someone/theirs/layers.1", str(tmp_path / "imported")),
                "gated": ("someone/closed", ""),
                "whole": ("someone/theirs", str(tmp_path / "none")),
                "unconverted": ("someone/published", ""),
                "nothing": ("someone/empty", ""),
                "absent": ("someone/absent", ""),
                "revision": ("someone/one@v9", ""),
            }
            kinds = {"import": "import", "whole": "import"}
            answers = ask(processes, *((kinds.get(k, "load"), *v) for k, v in asked.items()))
            found = dict(zip(asked, answers, strict=True))
            fetched = {path for _, path in hub.requests}
        again, gone = ask(processes, ("load", "someone/one", ""), ("load", "someone/other", ""))
    for name in ("load", "pinned", "folder"):
        assert found[name] == {"sum": pytest.approx(expected(load(run)))}
    imported = load(tmp_path / "imported")
    source = f"someone/theirs/layers.1@{theirs}"
    assert found["import"] == {"sum": pytest.approx(expected(imported)), "source": source}
    assert imported.training_record["layers"] == [1]
    assert not any("layers.0" in path or "model.safetensors" in path for path in fetched)
    errors = {name: answer["error"] for name, answer in found.items() if "error" in answer}
    assert not any("\n" in text for text in errors.values())
    assert "someone/closed is gated on http://127.0.0.1" in errors["gated"]
    assert (
        f"there is no SAE at someone/theirs@{theirs} itself but in folders of it: give one of "
        f"someone/theirs/layers.0, someone/theirs/layers.1"
    ) in errors["whole"]
    assert "`mlsae import` converts SAEs of other tools" in errors["unconverted"]
    assert "expected one of config.json, sae.safetensors, training.json" in errors["nothing"]
    assert "no such directory here and no such model on http://127.0.0.1" in errors["absent"]
    assert errors["revision"].startswith("someone/one on http://127.0.0.1")
    assert "has no such revision; check what is behind @" in errors["revision"]
    assert again == found["load"]
    assert "not in the cache" in gone["error"]
    assert "cannot be reached; give a directory, or run `hf download" in gone["error"]


@pytest.mark.parametrize("name", ["a", "./a/b", "/a/b", "~/a", "a/../b", "a b/c"])
def test_what_can_only_be_a_path_is_not_asked_of_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One line, at once; a `Path` never is."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotAnSAEError, match=r"there is no SAE at .*: no such directory"):
        load(name)
    with pytest.raises(NotAnSAEError, match=r"there is no SAE at a/b: no such directory"):
        load(Path("a/b"))


def test_a_directory_is_taken_before_the_hub(
    make_sae: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`runs/a` is what it looks like."""
    monkeypatch.chdir(tmp_path)
    run = make_sae(Path("runs/a"), "none", bias=True)
    assert load("runs/a").config == load(run).config
