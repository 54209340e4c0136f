"""The specification's own stores: each sound one is accepted, each broken one named by its rule."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mlsae.cli import main
from mlsae.store import IncompleteStoreError, InvalidStoreError, StoreError, open_store
from mlsae.store.tools.verify import verify

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXAMPLE = ROOT / "examples" / "read_store.py"
CASES: dict[str, dict[str, str]] = json.loads((HERE / "cases.json").read_text())
VALID = sorted(path.name for path in (HERE / "valid").iterdir())
SPECIFICATION = (ROOT / "storage_schema.md").read_text()
RULES = re.findall(
    r"^- \*\*(R-[A-Z0-9]+-\d+)\*\* (.*?)(?=^- \*\*|^\S|\Z)", SPECIFICATION, re.M | re.S
)
BEHAVIOUR: dict[str, list[str]] = json.loads((HERE / "behaviour.json").read_text())


def rule_of(case: str) -> str:
    """The rule that a broken store breaks, from its name."""
    return "-".join(case.split("-")[:3])


def test_the_corpus_is_what_its_table_says(invalid: Path):
    """No store without an entry, no entry without a store, and a sound one behind every broken."""
    assert sorted(CASES) == sorted(path.name for path in invalid.iterdir())
    assert {case["sound"] for case in CASES.values()} <= set(VALID)


def test_another_store_than_that_of_the_table_is_named(tmp_path: Path):
    """A change of the maker cannot pass for a change of nothing."""
    for name in ("make.py", "resealed.py"):
        shutil.copy(HERE / name, tmp_path)
    shutil.copytree(HERE / "valid", tmp_path / "valid")
    cases = CASES | {"R-META-1-changed-metadata": {"sound": "float32", "sha256": "0" * 64}}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "make.py"), str(tmp_path / "made")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "not as in cases.json: R-META-1-changed-metadata\n"


def test_every_must_has_a_sound_and_a_broken_store_or_a_test_of_behaviour():
    """Counted from the text of the specification."""
    assert len(RULES) > 40
    stores = {rule_of(case) for case in CASES}
    for rule, text in RULES:
        if "MUST" not in text:
            assert "SHOULD" in text, rule
        elif rule.startswith(("R-WRITER", "R-READER")):
            assert BEHAVIOUR[rule], rule
        else:
            assert rule in stores, rule
    assert stores <= {rule for rule, _ in RULES}
    assert set(BEHAVIOUR) <= {rule for rule, _ in RULES}


def test_the_tests_of_behaviour_exist():
    """Each is named as file::function."""
    for names in BEHAVIOUR.values():
        for name in names:
            file, function = name.split("::")
            tree = ast.parse((ROOT / file).read_text())
            found = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
            assert function in found, name


@pytest.mark.parametrize("name", VALID)
def test_sound_stores_are_accepted(name):
    """By verify, and every row can be read."""
    assert verify(HERE / "valid" / name).problems == []
    store = open_store(HERE / "valid" / name)
    for site in store.sites:
        for layer in store.layers:
            assert np.isfinite(store.read(site, layer)).all()


@pytest.mark.parametrize("case", sorted(CASES))
def test_broken_stores_are_named_by_their_rule_and_no_other(case, invalid: Path):
    """`verify` reports the rule in the store's name, and no other."""
    problems = verify(invalid / case).problems
    assert {problem.rule for problem in problems} == {rule_of(case)}
    assert all("\n" not in str(problem) for problem in problems)


@pytest.mark.parametrize("case", sorted(CASES))
def test_broken_stores_differ_from_a_sound_one_in_little(case, invalid: Path):
    """Most objects are those of the sound store, byte for byte."""
    sound, broken = HERE / "valid" / CASES[case]["sound"], invalid / case
    names = {p.relative_to(r) for r in (sound, broken) for p in r.rglob("*") if p.is_file()}
    same = [
        name
        for name in names
        if (sound / name).is_file()
        and (broken / name).is_file()
        and (sound / name).read_bytes() == (broken / name).read_bytes()
    ]
    assert len(same) >= len(names) / 2
    assert len(same) < len(names)


def test_the_sound_stores_are_those_that_their_maker_makes(tmp_path: Path):
    """Compressed bytes depend on the version of zstd, so those stores are left out."""
    subprocess.run([sys.executable, str(HERE / "sound.py"), str(tmp_path)], check=True)
    for file in (HERE / "valid").rglob("*"):
        name = file.relative_to(HERE)
        if file.is_file() and not name.parts[1].endswith("zstd"):
            assert (tmp_path / name).read_bytes() == file.read_bytes(), name


def test_sound_stores_are_read_without_mlsae(tmp_path: Path):
    """By zarr-python and the specification alone; zarrs and tensorstore read equal values."""
    done = subprocess.run(
        [sys.executable, str(HERE / "read_plainly.py"), str(HERE / "valid"), str(EXAMPLE), "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "read without mlsae\n"
    for name in VALID:
        store = open_store(HERE / "valid" / name)
        found = np.load(tmp_path / f"{name}.npz")
        assert np.array_equal(found["eligible"], store.eligible())
        for site in store.sites:
            for layer in store.layers:
                ours, theirs = store.read(site, layer), found[f"{site}/{layer}"]
                if store.encoding == "int8":
                    mean = store.calibration.sites[site].mean[store.layers.index(layer)]
                    allowed = 1e-6 * (np.abs(ours - mean) + np.abs(mean))
                    assert (np.abs(ours - theirs) <= allowed).all()
                else:
                    assert np.array_equal(ours, theirs)


def test_the_example_reader_is_short_and_knows_only_zarr():
    """At most 60 lines; nothing but numpy, zarr and the standard library."""
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) <= 60
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported <= {"hashlib", "json", "sys", "pathlib", "numpy", "zarr"}


def test_the_example_reader_says_what_a_store_holds():
    """As a person would run it."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(HERE / "valid" / "int8")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[0] == "30 rows, 22 eligible, as int8"
    assert len(done.stdout.splitlines()) == 3


def test_the_command_names_the_rule(invalid: Path):
    """`mlsae store verify` prints rule, object and what is wrong; exit status 1."""
    result = CliRunner().invoke(main, ["store", "verify", str(invalid / "R-TOKEN-3-unknown-bit")])
    assert result.exit_code == 1
    assert "R-TOKEN-3 token_flags: tokens 0 to 30: unknown bits" in result.output
    assert "breaks 1 rule of storage_schema.md" in result.output


def test_activations_of_an_incomplete_store_are_refused(invalid: Path):
    """Tokens can be read by callers who ask for that."""
    path = invalid / "R-COMPLETE-1-incomplete"
    with pytest.raises(IncompleteStoreError, match="is incomplete: 2 of 2 shards are committed"):
        open_store(path)
    store = open_store(path, incomplete=True)
    assert len(store.tokens()) == 30
    with pytest.raises(IncompleteStoreError, match="only its tokens can be read"):
        store.read("resid_post", 0)


@pytest.mark.parametrize(
    "case",
    ["R-META-1-a-path-outside", "R-PLAN-4-unknown-site", "R-PLAN-7-too-many-shards"],
)
def test_names_and_sizes_that_a_store_makes_up_are_refused(case, invalid: Path):
    """Before a path is made of them or memory is taken by them."""
    with pytest.raises(InvalidStoreError):
        open_store(invalid / case)


@pytest.mark.parametrize(
    "case",
    [c for c in sorted(CASES) if rule_of(c) in ("R-SEAL-1", "R-META-1", "R-VERSION-2", "R-PLAN-1")],
)
def test_records_metadata_and_unknown_keys_are_checked_when_a_store_is_opened(case, invalid: Path):
    """Not only by verify."""
    if "provenance" in case:
        with pytest.raises(StoreError):
            open_store(invalid / case).provenance()
    elif "record" in case:
        assert verify(invalid / case).problems
    else:
        with pytest.raises(StoreError):
            open_store(invalid / case)


@pytest.mark.parametrize(
    "case",
    [
        "R-SHARD-1-chunks-swapped",
        "R-SHARD-2-chunk-past-the-end",
        "R-SHARD-3-changed-chunk",
        "R-SHARD-3-changed-index",
        "R-SHARD-5-chunk-of-other-length",
    ],
)
def test_shards_are_checked_before_their_values_are_used(case, invalid: Path):
    """By reading alone; the message names the shard."""
    with pytest.raises(StoreError, match=r"shard [01] of activations/resid_post/0\) is damaged"):
        open_store(invalid / case).read("resid_post", 0)


def test_unfinished_writes_are_passed_by(invalid: Path):
    """A reader takes no notice of them; verify says that they may go."""
    path = invalid / "R-LAYOUT-3-unfinished-write"
    assert len(open_store(path).read("resid_post", 0)) == 30
