"""Every byte counts: a store with any byte changed is never read as sound."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlsae.base.errors import MlsaeError
from mlsae.base.files import read_sealed, seal
from mlsae.store import (
    DamagedStoreError,
    InvalidStoreError,
    NotAStoreError,
    SchemaVersionError,
    StoreError,
    open_store,
    resume,
)
from mlsae.store.tools.verify import Problem, verify
from mlsae.store.write.plan import make_plan
from mlsae.store.write.setup import write_setup
from mlsae.store.write.tokens import TokenArrays

FEW_FILES = {"num_sequences": 14, "layers": (0, 3), "shard_bytes": 8000}
"""Two shards, the second one short, of each of two layers: every kind of file, few of each."""
SPECIFICATION = Path(__file__).parents[2] / "storage_schema.md"


def files_of(path: Path) -> list[Path]:
    """Every file of a store."""
    return sorted(file for file in path.rglob("*") if file.is_file())


def judge(path: Path) -> list[str]:
    """Problems found, or the refusal to open."""
    try:
        return [str(problem) for problem in verify(path).problems]
    except StoreError as error:
        return [str(error)]


def test_a_sound_store_has_no_problems(sample_maker):
    """For every encoding, with provenance beside it."""
    for encoding in ("float16", "bfloat16", "float32"):
        made = sample_maker(encoding, encoding=encoding, provenance={"host": "here"})
        assert verify(made.path).problems == []


def test_one_flipped_bit_in_any_file_is_found(sample_maker):
    """Three random bits of every file of a store, one at a time."""
    made = sample_maker(**FEW_FILES, provenance={"host": "here"})
    generator = random.Random(0)
    for file in files_of(made.path):
        data = file.read_bytes()
        for _ in range(3):
            bit = generator.randrange(8 * len(data))
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            assert judge(made.path), f"bit {bit} of {file.relative_to(made.path)}"
        file.write_bytes(data)
    assert verify(made.path).problems == []


def test_reading_never_returns_flipped_activations(sample):
    """A flipped bit in any activation chunk raises where it is read, naming the shard."""
    generator = random.Random(1)
    for file in (sample.path / "activations").rglob("c.*"):
        data = file.read_bytes()
        flipped = bytearray(data)
        flipped[generator.randrange(len(data))] ^= 4
        file.write_bytes(flipped)
        layer = int(file.parent.name)
        with pytest.raises(DamagedStoreError, match=rf"shard \d of activations/resid_post/{layer}"):
            open_store(sample.path).read("resid_post", layer)
        file.write_bytes(data)


@pytest.mark.parametrize(
    "harm",
    [
        "missing",
        pytest.param("truncated", marks=pytest.mark.slow),
        pytest.param("longer", marks=pytest.mark.slow),
        "swapped",
    ],
)
def test_missing_truncated_longer_or_swapped_files_are_found(sample_maker, harm):
    """Each file of the store in turn, but the card, which its owner may edit."""
    sample = sample_maker(**FEW_FILES)
    files = [file for file in files_of(sample.path) if file.name != "README.md"]
    for file in files:
        data = file.read_bytes()
        if harm == "missing":
            file.unlink()
        elif harm == "truncated":
            file.write_bytes(data[:-1])
        elif harm == "longer":
            file.write_bytes(data + b"\0")
        else:
            other = next(
                f for f in files if f != file and f.suffix == file.suffix and f.read_bytes() != data
            )
            shutil.copyfile(other, file)
        assert judge(sample.path), f"{harm}: {file.relative_to(sample.path)}"
        file.write_bytes(data)
    assert verify(sample.path).problems == []


def test_foreign_files_are_named_and_hub_files_ignored(sample):
    """A README of a hub is no damage; anything else is."""
    (sample.path / "README.md").write_text("shared")
    assert verify(sample.path).problems == []
    (sample.path / "activations" / "notes.txt").write_text("?")
    assert [str(p) for p in verify(sample.path).problems] == [
        "R-LAYOUT-3 activations/notes.txt: does not belong here"
    ]


def test_moments_that_are_not_those_of_the_values_are_found(sample):
    """Even when every hash around them is right."""
    from mlsae.store.format import moments as m

    store = open_store(sample.path)
    name = sample.path / "moments/00002.safetensors"
    parsed = m.from_bytes(name.read_bytes(), store.sites, store.layers, store.d_model)
    parsed["resid_post"].m2_2LGD[0, 1] *= 1.001
    name.write_bytes(m.to_bytes(parsed))
    record = read_sealed(sample.path / "commits/00002.json")
    import hashlib

    record["moments_sha256"] = hashlib.sha256(name.read_bytes()).hexdigest()
    (sample.path / "commits/00002.json").write_bytes(seal(record))
    assert [(p.rule, p.path) for p in verify(sample.path).problems] == [
        ("R-MOMENT-3", "moments/00002.safetensors")
    ]


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("2.0", "follows schema 2.0, this mlsae reads 1.0; upgrade mlsae"),
        ("0.2", "read it with the mlsae that wrote it"),
        ("one", "schema_version must be MAJOR.MINOR such as 1.0, got 'one'"),
    ],
)
def test_stores_of_other_versions_are_refused(sample, version, message):
    """The version decides before anything else is looked at."""
    plan = read_sealed(sample.path / "plan.json")
    (sample.path / "plan.json").write_bytes(seal({**plan, "schema_version": version, "new": 1}))
    with pytest.raises(SchemaVersionError, match=message):
        open_store(sample.path)


def test_unknown_keys_of_a_plan_are_refused(sample):
    """A reader must not guess what a key means."""
    plan = read_sealed(sample.path / "plan.json")
    (sample.path / "plan.json").write_bytes(seal({**plan, "rotation": "hadamard"}))
    with pytest.raises(MlsaeError, match=r"plan\.json has unknown keys rotation"):
        open_store(sample.path)


def test_what_is_no_store_is_said_to_be_none(tmp_path: Path):
    """Absent, empty, and a plain Zarr group."""
    with pytest.raises(NotAStoreError, match="does not exist; expected an activation store"):
        open_store(tmp_path / "absent")
    with pytest.raises(NotAStoreError, match=r"is not an activation store: it has no plan\.json"):
        open_store(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({"plan": "to conquer the world"}))
    with pytest.raises(DamagedStoreError, match="does not match its checksum"):
        open_store(tmp_path)


def test_the_specification_states_every_rule_that_the_store_reports():
    """A reader of a problem finds its rule; nothing is reported that is not specified."""
    import re

    sources = (SPECIFICATION.parent / "store").rglob("*.py")
    reported = {
        rule for path in sources for rule in re.findall(r'"(R-[A-Z]+-\d+)"', path.read_text())
    }
    stated = set(re.findall(r"^- \*\*(R-[A-Z]+-\d+)\*\*", SPECIFICATION.read_text(), re.M))
    assert reported
    assert reported <= stated
    assert str(Problem(rule="R-X-1", path="a", message="b")) == "R-X-1 a: b"


class UncheckedArrays(TokenArrays):
    """Arrays of a producer that looks at nothing: one flag has an unknown bit."""

    def block(self, name, start, stop):
        values = super().block(name, start, stop)
        if name == "token_flags":
            values[5 - start : 6 - start] = 8
        return values


def made_carelessly(path: Path, changes: dict[str, object]) -> None:
    """The tokens of a store whose producer passes over the writer's own checks."""
    arrays = UncheckedArrays(np.arange(48), None, None, 8)
    plan = make_plan(
        arrays,
        context_length=8,
        layers=[0],
        d_model=4,
        sites=["resid_post"],
        encoding="float32",
        batch_sequences=1,
        shard_bytes=2**20,
        source={},
    )
    plan = replace(plan, **changes)
    (path / "plan.json").write_bytes(seal(plan.to_json()))
    write_setup(path, plan, arrays, None)


def test_flags_are_checked_whatever_wrote_the_store(tmp_path: Path):
    """An unknown bit is found although every hash around it is right."""
    made_carelessly(tmp_path, {})
    with resume(tmp_path) as writer:
        writer.append({("resid_post", 0): np.ones((writer.num_rows, 4), np.float32)})
    problems = verify(tmp_path).problems
    assert [(p.rule, p.path) for p in problems] == [("R-TOKEN-3", "token_flags")]


@pytest.mark.parametrize(
    ("changes", "rule", "message"),
    [
        ({"batch_sequences": 5}, "R-PLAN-5", "shard_rows must be whole chunks and whole batches"),
        ({"context_length": 5}, "R-TOKEN-2", "num_tokens must be whole sequences of context_len"),
    ],
)
def test_rules_of_the_plan_are_checked_before_anything_is_read(tmp_path, changes, rule, message):
    """By whoever opens the store; verify names the rule."""
    made_carelessly(tmp_path, changes)
    with pytest.raises(InvalidStoreError, match=message):
        open_store(tmp_path, incomplete=True)
    assert [p.rule for p in verify(tmp_path).problems] == [rule]
