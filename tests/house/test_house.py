"""The checkout is the package: the guards that keep this honest, and the walls of the house."""

import ast
import configparser
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlsae

ROOT = Path(__file__).resolve().parents[2]
ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))

ALLOWED = {
    "__init__": set(),
    "__main__": {"cli"},
    "cli": {"commands", "base"},
    "commands": {"demo", "harvest", "train", "analyze", "sae", "store", "base"},
    "demo": {"harvest", "train", "analyze", "models", "sae", "store", "base"},
    "harvest": {"models", "store", "base"},
    "train": {"sae", "store", "base"},
    "analyze": {"models", "sae", "store", "base"},
    "models": {"base"},
    "sae": {"base"},
    "store": {"base"},
    "base": set(),
}
"""Room → rooms it may import: cli → commands → demo → stages → models, sae, store → base."""

BELOW = {
    "store": {
        "places": {"schema", "errors"},
        "format": {"schema", "errors"},
        "read": {"plan", "plancheck", "format", "places", "schema", "errors"},
        "write": {"read", "plan", "plancheck", "format", "places", "schema", "errors"},
        "copying": {"write", "read", "plan", "plancheck", "format", "places", "schema", "errors"},
        "tools": {"write", "read", "plan", "plancheck", "format", "places", "schema", "errors"},
    },
    "train": {
        "data": set(),
        "step": {"data"},
        "running": {"config", "sweep", "options", "plan", "initial", "step", "data"},
        "published": {"running", "config", "sweep", "options", "plan", "initial", "step", "data"},
    },
    "sae": {
        "kernels": set(),
        "architectures": {"kernels", "errors"},
        "formats": {
            "model",
            "architectures",
            "kernels",
            "config",
            "directory",
            "location",
            "errors",
        },
    },
    "harvest": {"text": set(), "compute": set()},
    "analyze": {
        "results": set(),
        "events": {"results", "config", "pairing", "selection"},
        "examples": {"results", "config", "pairing", "selection", "transformer"},
        "interop": {"results", "selection", "transformer"},
        "measure": {"results", "events", "examples", "config", "pairing", "selection"},
    },
    "commands": {"store": {"options"}},
    "models": {
        "source": set(),
        "families": set(),
        "structure": set(),
        "weights": set(),
        "passes": {"transformer", "inputs", "families", "structure", "weights"},
    },
    "base": {"machine": {"errors", "units"}, "output": {"units"}},
}
"""Room → its inner room → what of the same room that may import: data goes one way inside too."""

DOOR = 12
"""From every door at most a dozen things are seen."""

MOST_FILES = 1100
"""Tracked files of the repository."""

PIP_WHEEL = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]

FOREIGN = {
    "store": {"torch", "transformers", "accelerate", "datasets"},
    "sae": {"transformers", "zarr", "datasets", "accelerate"},
    "train": {"transformers", "zarr", "datasets"},
    "base": {"zarr", "transformers", "numpy"},
}
"""Room → libraries it must not know."""


def packages() -> list[str]:
    """Dotted names of the package's folders below `mlsae`, inner rooms too."""
    folders = [path.parent for room in ROOMS for path in (ROOT / room).rglob("__init__.py")]
    return sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)


def modules() -> Iterator[tuple[str, Path]]:
    """(room, file) of every module of the package."""
    for path in ROOT.glob("*.py"):
        yield path.stem, path
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            yield room, path


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_package_is_the_checkout():
    """This tree is tested, not another copy that lies on the path."""
    assert Path(mlsae.__file__).parent == ROOT


def test_no_module_is_loaded_under_two_names(tmp_path: Path):
    """A second copy of the package would have second classes, and `except` would miss them."""
    script = (
        "import sys, mlsae.cli, mlsae.store, mlsae.sae, mlsae.harvest, mlsae.train, mlsae.analyze\n"
        "twice = [n for n, m in list(sys.modules.items())\n"
        f"         if str(getattr(m, '__file__', '') or '').startswith({str(ROOT) + os.sep!r})\n"
        "         and '.venv' not in m.__file__ and n.split('.')[0] != 'mlsae']\n"
        "sys.exit(', '.join(twice) or None)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    twice = {
        name
        for name, module in list(sys.modules.items())
        if (file := getattr(module, "__file__", None))
        and Path(file).is_relative_to(ROOT)
        # pytest imports the root's `__init__` under the checkout's name; it holds a version only.
        and Path(file) != ROOT / "__init__.py"
        and ".venv" not in Path(file).parts
        and "tests" not in Path(file).parts
        and "benchmarks" not in Path(file).parts
        and name.split(".")[0] != "mlsae"
    }
    assert twice == set()


def test_the_list_of_packages_is_the_list_of_folders():
    """setup.cfg lists them by hand: `find:` would silently build no `mlsae` at all."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    assert listed == ["mlsae", *(f"mlsae.{name}" for name in packages())]
    loose = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert {".".join(path.relative_to(ROOT).parts) for path in loose} == set(packages())
    assert set(ROOMS) | {"__init__", "__main__", "cli"} == set(ALLOWED)
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", "__main__", "cli"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the tracked files in a directory of its own."""
    source = tmp_path_factory.mktemp("build") / "source tree"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).exists() and not name.startswith(("tests/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    out = source.parent / "wheel"
    subprocess.run(
        [*PIP_WHEEL, f"--wheel-dir={out}", str(source)],
        check=True,
    )
    return next(out.glob("*.whl"))


def test_the_wheel_holds_exactly_the_package(wheel: Path):
    """Every module and data file of the rooms, and nothing else of the checkout."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout.split("\n")
    expected = {"mlsae/storage_schema.md", "mlsae/py.typed"}
    for name in filter(None, tracked):
        path = Path(name)
        is_module = path.suffix == ".py" and (len(path.parts) == 1 or path.parts[0] in ROOMS)
        is_data = path.parts[0] in ROOMS and path.parent.name in {"templates", "model", "text"}
        if (is_module or is_data) and (ROOT / name).exists():
            expected.add(f"mlsae/{name}")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_the_wheel_works_from_an_empty_directory(wheel: Path, tmp_path: Path):
    """A user who has no checkout gets the same command."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = (
        "import sys, mlsae, mlsae.cli, mlsae.demo\n"
        "assert mlsae.demo.model_path().joinpath('model.safetensors').exists()\n"
        "print(mlsae.__file__)\n"
        "sys.argv[1:] = ['--version']; mlsae.cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.split() == [
        str(site / "mlsae" / "__init__.py"),
        "mlsae,",
        "version",
        mlsae.__version__,
    ]


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_go_one_way(room: str):
    """Each room imports only the rooms below it, and no library that it must not know."""
    seen = 0
    for owner, path in modules():
        if owner != room:
            continue
        seen += 1
        for name in imports_of(path):
            top, *rest = name.split(".")
            if top == "mlsae" and rest and rest[0] != "__version__":
                assert rest[0] == room or rest[0] in ALLOWED[room], f"{path}: imports {name}"
            assert top not in FOREIGN.get(room, set()), f"{path}: imports {name}"
            assert top not in ROOMS, f"{path}: imports {name} without its package"
    assert seen > 0


@pytest.mark.parametrize(
    ("room", "inner"), [(room, inner) for room, inners in BELOW.items() for inner in inners]
)
def test_imports_go_one_way_inside_a_room(room: str, inner: str):
    """An inner room knows those below it, and no door of its own room."""
    allowed = BELOW[room][inner] | {inner}
    above = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / room / inner).rglob("*.py")
        for name in imports_of(path)
        if name == f"mlsae.{room}"
        or (name.startswith(f"mlsae.{room}.") and name.split(".")[2] not in allowed)
    }
    assert above == set()


def test_results_are_read_without_what_made_them(tmp_path: Path):
    """Whoever looks at an analysis needs neither its store nor its SAE, nor their libraries."""
    known = ("mlsae.analyze.results", "mlsae.base")
    above = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "analyze" / "results").rglob("*.py")
        for name in imports_of(path)
        if name.split(".")[0] == "mlsae" and not name.startswith(known)
    }
    assert above == set()
    script = (
        "import sys\n"
        "from mlsae.analyze import load\n"
        "import mlsae.analyze.results.text.listing, mlsae.analyze.results.page.render\n"
        "import mlsae.analyze.results.figures.registry\n"
        "sys.exit(', '.join({'torch', 'zarr', 'transformers'} & set(sys.modules)) or None)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_inner_room_has_a_rule():
    """A new one is given its place."""
    inner = {tuple(name.split(".")[:2]) for name in packages() if "." in name}
    assert inner == {(room, name) for room, inners in BELOW.items() for name in inners}


@pytest.mark.parametrize("package", packages())
def test_a_dozen_things_are_seen_from_a_door(package: str):
    """Files and folders of each, but for its own `__init__`."""
    folder = ROOT / package.replace(".", "/")
    seen = {path.name for path in folder.iterdir()} - {"__init__.py", "__pycache__"}
    assert len(seen) <= DOOR, sorted(seen)


def test_a_store_is_read_and_written_without_torch(tmp_path: Path):
    """Producers and readers of activations need not have it loaded."""
    script = (
        "import sys, mlsae.store, mlsae.store.tools.verify, mlsae.store.tools.info\n"
        "sys.exit(', '.join({'torch', 'transformers', 'accelerate'} & set(sys.modules)) or None)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_only_the_command_line_changes_how_the_process_keeps_memory():
    """The heap belongs to whoever started the process; a library leaves it as it is."""
    heap = "mlsae.base.machine.heap"
    owners = {owner for owner, path in modules() if heap in imports_of(path)}
    assert owners == {"commands"}


def test_what_can_be_made_is_not_kept():
    """At most 1,100 files are tracked: derived data is made where it is used."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout.splitlines()
    assert len(tracked) <= MOST_FILES


def test_files_hold_one_idea():
    """No file over 500 lines, in the package, its tests and its benchmarks."""
    beside = [path for name in ("tests", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    for path in (*(path for _, path in modules()), *beside):
        assert len(path.read_text().splitlines()) <= 500, path


def test_what_a_room_exports_is_there_and_documented():
    """`__all__` names what exists, and every class and function in it has a docstring."""
    import importlib

    for room in packages():
        module = importlib.import_module(f"mlsae.{room}")
        assert module.__doc__, room
        for name in getattr(module, "__all__", []):
            value = getattr(module, name)
            if callable(value) and getattr(value, "__module__", "").startswith("mlsae"):
                assert value.__doc__, f"{room}.{name}"


def test_the_continuous_integration_runs_what_readme_says():
    """One door: README's test command."""
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make demo" in (ROOT / "README.md").read_text()
