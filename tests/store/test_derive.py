"""A copy of a part of a store, or in another encoding: a sound store that says where it is from."""

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlsae.base.errors import InputError
from mlsae.base.files import read_sealed
from mlsae.base.units import parse_range, portion
from mlsae.cli import main
from mlsae.store import (
    ActivationError,
    Calibrator,
    DamagedStoreError,
    IncompleteStoreError,
    PlanMismatchError,
    Store,
    create,
    open_store,
)
from mlsae.store.copying.copy import CopyConfig, CopyResult, copy
from mlsae.store.plan import KeptPositions
from mlsae.store.tools.verify import verify

SIGNALLED = """
import os, signal, sys
number, left, target = signal.Signals[sys.argv[1]], int(sys.argv[2]), sys.argv[4]
def count(event, args):
    # Every file that gets its name.
    global left
    if event == "os.rename" and str(args[0]).startswith(target):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)
sys.addaudithook(count)
from mlsae.cli import main
main(["store", "copy", *sys.argv[3:]])
"""


def copied(source: object, target: object, **options: Any) -> CopyResult:
    """Copy with these settings."""
    return copy(CopyConfig(source=str(source), target=str(target), **options))


def command(*arguments: object) -> Result:
    """`mlsae store copy` in this process."""
    return CliRunner().invoke(main, ["store", "copy", *map(str, arguments)])


def refused(result: Result, message: str) -> None:
    """One line, exit status 1."""
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert result.output.count("\n") == 1


@pytest.fixture
def two_sites(tmp_path: Path) -> Path:
    """A float32 store of two sites and three layers, with flags, documents and a source."""
    generator = np.random.default_rng(0)
    num_tokens = 40 * 24
    with create(
        tmp_path / "two",
        tokens=np.arange(num_tokens) % 97,
        documents=np.arange(num_tokens) // 100,
        token_flags=(np.arange(num_tokens) % 11 == 0).astype(np.uint8),
        context_length=24,
        layers=(0, 2, 5),
        sites=("resid_mid", "mlp_out"),
        d_model=70,
        encoding="float32",
        batch_sequences=2,
        shard_bytes=70 * 4 * 24 * 8,
        source={"model": {"fingerprint": "f"}, "license": "mit"},
        provenance={"started": "2026", "model": {"name": "someone/some-model"}},
    ) as writer:
        values = generator.normal(size=(6, num_tokens, 70)).astype(np.float32)
        values[..., 7] *= 100
        writer.append(dict(zip(writer._keys, values, strict=True)))
    return tmp_path / "two"


def test_some_layers_sites_and_rows(two_sites, tmp_path):
    """The values, tokens, documents and flags are those of the source, the rest of the plan too."""
    done = command(
        two_sites, tmp_path / "part", "--layers", "0,5", "--sites", "mlp_out", "--rows", "120:600"
    )
    assert done.exit_code == 0, done.output
    source, part = open_store(two_sites), open_store(tmp_path / "part")
    assert verify(part.place).problems == []
    assert (part.layers, part.sites, part.num_rows) == ((0, 5), ("mlp_out",), 480)
    for layer in (0, 5):
        expected = source.reader("mlp_out", layer).read(120, 600)[0]
        assert np.array_equal(part.reader("mlp_out", layer).read()[0], expected)
    for name in ("tokens", "documents", "token_flags", "positions", "eligible"):
        by_row = {"start": 120, "stop": 600}
        assert np.array_equal(getattr(part, name)(), getattr(source, name)(**by_row)), name
    kept = ("source", "context_length", "batch_sequences", "encoding", "compression", "shard_rows")
    for name in kept:
        assert getattr(part.plan, name) == getattr(source.plan, name), name
    assert part.plan.derived_from == {
        "store_id": source.store_id,
        "sequences": [5, 25],
        "encoding": "float32",
        "derived_from": None,
    }
    assert part.store_id != source.store_id
    assert done.output.startswith(
        f"copied from {two_sites} to {tmp_path}/part: 480 rows of each of 2 layers in float32, "
    )
    assert done.output.endswith(
        f" s, store_id {part.store_id[:12]}, derived from {source.store_id[:12]}\n"
    )


def test_where_a_copy_comes_from_is_recorded(two_sites, tmp_path):
    """The source's own runs, this one, and in the card model, licence and the store it was."""
    copied(two_sites, tmp_path / "one", layers=(0, 2))
    copied(tmp_path / "one", tmp_path / "two layers down", layers=(2,))
    source, one = open_store(two_sites), open_store(tmp_path / "one")
    store = open_store(tmp_path / "two layers down")
    runs = store.provenance()
    assert source.provenance()[0] in runs
    copies = {run["source"] for run in runs if run.get("kind") == "copy"}
    assert copies == {str(two_sites), str(tmp_path / "one")}
    assert len(runs) == 3
    chain = store.plan.derived_from
    assert (chain["store_id"], chain["derived_from"]["store_id"]) == (one.store_id, source.store_id)
    card = (tmp_path / "two layers down/README.md").read_text()
    assert "| model | someone/some-model |" in card
    assert "license: mit" in card
    assert f"| made from | store {one.store_id}, sequences 0 to 40, in float32 |" in card


def test_kept_positions_stay_those_of_their_sequence(tmp_path):
    """They follow from a sequence's number, so a copy begins with the first."""
    tokens = np.arange(30 * 16)
    with create(
        tmp_path / "kept",
        tokens=tokens,
        context_length=16,
        layers=(0,),
        d_model=8,
        keep_positions=5,
        keep_seed=3,
    ) as writer:
        rows = np.random.default_rng(0).normal(size=(150, 8)).astype(np.float32)
        writer.append({("resid_post", 0): rows})
    copied(tmp_path / "kept", tmp_path / "part", rows=(0, 60))
    source, part = open_store(tmp_path / "kept"), open_store(tmp_path / "part")
    assert verify(part.place).problems == []
    assert part.plan.keep_positions == KeptPositions(num=5, seed=3)
    assert np.array_equal(part.row_tokens(), source.row_tokens(0, 60))
    assert np.array_equal(part.read("resid_post", 0), source.read("resid_post", 0, 0, 60))
    refused(
        command(tmp_path / "kept", tmp_path / "other", "--rows", "5:60"),
        "a copy has to begin with row 0: --rows 0:60",
    )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("float32", "float16"),
        ("float32", "int8-zstd"),
        ("float16-zstd", "bfloat16"),
        ("bfloat16", "int8"),
        ("int8", "float32-zstd"),
        ("bfloat16", "bfloat16-zstd"),
    ],
)
def test_another_encoding(two_sites, tmp_path, before, after):
    """As if the decoded values had been harvested in it; what is held the same way stays exact."""
    if before != "float32":
        copied(two_sites, tmp_path / "before", encoding=before)
        two_sites = tmp_path / "before"
    copied(two_sites, tmp_path / "after", encoding=after)
    source, store = open_store(two_sites), open_store(tmp_path / "after")
    assert verify(store.place).problems == []
    encoding, _, compression = after.partition("-")
    assert store.encoding == encoding
    assert store.is_compressed == bool(compression)
    added = read_sealed(tmp_path / "after/commits/00000.json")["added_fvu"]
    is_measured = encoding != source.encoding and encoding != "float32"
    for site in store.sites:
        for layer in store.layers:
            x, decoded = source.read(site, layer), store.read(site, layer)
            if not is_measured:
                assert np.array_equal(decoded, x)
                continue
            error = np.square(decoded - x).sum() / np.square(x - x.mean(0)).sum()
            assert error < 2e-4
            of_shard = slice(0, store.shard_rows)
            chosen = store.eligible()[of_shard]
            x, decoded = x[of_shard][chosen], decoded[of_shard][chosen]
            error = np.square(decoded - x).sum() / np.square(x - x.mean(0)).sum()
            assert added[site][str(layer)]["num_rows"] == len(x)
            assert added[site][str(layer)]["total"] == pytest.approx(error, rel=1e-3)


def test_int8_is_calibrated_by_the_first_eligible_rows_of_the_copy(sample_maker, tmp_path):
    """At least 4,096 of them, whole chunks of the source; all, if there are fewer."""
    made = sample_maker(num_sequences=300, encoding="float32", shard_bytes=40_000)
    copied(made.path, tmp_path / "int8", encoding="int8", rows=(240, 7200))
    source, store = open_store(made.path), open_store(tmp_path / "int8")
    num_rows = store.plan.calibration.num_rows
    assert 4096 <= num_rows <= 4096 + source.chunk_rows
    keys = [("resid_post", layer) for layer in source.layers]
    calibrator = Calibrator(keys, 20)
    for start in range(240, 7200, source.chunk_rows):
        if not calibrator.is_ready:
            chosen = np.flatnonzero(source.eligible(1, start, start + source.chunk_rows)) + start
            calibrator.add({key: made.activations[key[1]][chosen] for key in keys})
    assert calibrator.num_rows == num_rows
    rows = np.flatnonzero(source.eligible()[240:])[:num_rows] + 240
    found, expected = (c.sites["resid_post"] for c in (store.calibration, calibrator.result()))
    for at, layer in enumerate(store.layers):
        x = made.activations[layer][rows].astype(np.float64)
        np.testing.assert_allclose(found.mean[at], x.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.scale, expected.scale)
    copied(made.path, tmp_path / "few", encoding="int8", rows=(0, 48))
    few = open_store(tmp_path / "few")
    assert few.plan.calibration.num_rows == source.eligible()[:48].sum()


def test_parts_of_an_int8_store_are_not_quantised_again(sample_maker, tmp_path):
    """Quanta, exponents and scales are the source's, and so is what they cost where it is known."""
    made = sample_maker(encoding="float32", num_sequences=40)
    copied(made.path, tmp_path / "int8", encoding="int8-zstd")
    copied(tmp_path / "int8", tmp_path / "part", layers=(1, 3), rows=(0, 500 // 24 * 24))
    copied(tmp_path / "int8", tmp_path / "odd", layers=(1, 3), rows=(48, 480))
    whole = open_store(tmp_path / "int8")
    for name, first in (("part", 0), ("odd", 48)):
        part = open_store(tmp_path / name)
        assert verify(part.place).problems == []
        for at, layer in enumerate((1, 3)):
            known, found = (s.calibration.sites["resid_post"] for s in (whole, part))
            assert np.array_equal(found.mean[at], known.mean[at + 1])
            assert np.array_equal(found.scale[at], known.scale[at + 1])
            expected = whole.reader("resid_post", layer).read(first, first + part.num_rows)
            for mine, theirs in zip(part.reader("resid_post", layer).read(), expected, strict=True):
                assert np.array_equal(mine, theirs)
    records = [read_sealed(tmp_path / name / "commits/00000.json") for name in ("int8", "part")]
    (known,), (found,) = (record["added_fvu"].values() for record in records)
    assert found == {layer: known[layer] for layer in ("1", "3")}
    assert read_sealed(tmp_path / "odd/commits/00000.json")["added_fvu"] is None


def test_an_encoding_that_costs_too_much_is_refused(two_sites, tmp_path):
    """Naming the flag that allows it, which does."""
    options = ["--encoding", "int8", "--max-encoding-fvu", "1e-9"]
    refused(
        command(two_sites, tmp_path / "int8", *options),
        "adds an FVU of",
    )
    with pytest.raises(IncompleteStoreError):
        open_store(tmp_path / "int8")
    with pytest.raises(ActivationError, match=r"or allow it with --max-encoding-fvu"):
        copied(two_sites, tmp_path / "int8", encoding="int8", max_encoding_fvu=1e-9)
    copied(two_sites, tmp_path / "int8", encoding="int8", max_encoding_fvu=1.0)
    # A cost that was accepted once is not held against a later copy.
    copied(tmp_path / "int8", tmp_path / "part", layers=(0,), max_encoding_fvu=1e-9)


def test_naming_all_there_is_makes_an_exact_copy(sample, tmp_path):
    """Nothing is derived where nothing is left out."""
    result = copied(
        sample.path,
        tmp_path / "copy",
        layers=(0, 1, 3),
        sites=("resid_post",),
        rows=(0, 888),
        encoding="float16",
    )
    assert (
        result.store_id
        == open_store(sample.path).store_id
        == open_store(tmp_path / "copy").store_id
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "0,7"], "acts does not hold layer 7; it has 0, 1, 3"),
        (["--sites", "mlp_out"], "acts does not hold site mlp_out; it has resid_post"),
        (["--rows", "10:100"], "--rows 10:100 would cut a sequence of 24 rows; 0:120 are whole"),
        (["--rows", "900"], "--rows 0:900: "),
        (["--rows", "1M"], "acts has rows 0:888"),
        (["--encoding", "int4"], "encoding 'int4' is not one of float16, bfloat16, float32, int8,"),
    ],
)
def test_what_a_store_does_not_have_is_refused(sample, tmp_path, arguments, message):
    """In one line that says what it has; nothing is made."""
    refused(command(sample.path, tmp_path / "copy", *arguments), message)
    assert not (tmp_path / "copy").exists()


def test_other_refusals(sample, two_sites, tmp_path):
    """Places elsewhere, incomplete sources, other stores at the target, ranges that are none."""
    refused(
        command(sample.path, "s3://bucket/acts", "--layers", "0"),
        "s3://bucket/acts: a part of a store, or one in another encoding, is made in a directory; "
        "copy that one to s3://bucket/acts then",
    )
    with pytest.raises(PlanMismatchError, match=r"acts holds a store of another plan \("):
        copied(two_sites, sample.path, layers=(0,))
    (two_sites / "complete.json").unlink()
    with pytest.raises(IncompleteStoreError, match="is incomplete: 5 of 5 shards are committed"):
        copied(two_sites, tmp_path / "copy", layers=(0,))
    for text in ("9:9", "a:b", ":"):
        usage = command(sample.path, tmp_path / "copy", "--rows", text)
        assert usage.exit_code == 2
        assert "Invalid value for '--rows'" in usage.output
    with pytest.raises(InputError, match="expected START:STOP with START below STOP, got '9:5'"):
        parse_range("9:5")
    assert (parse_range("1k:2.5k"), parse_range("24")) == ((1000, 2500), (0, 24))


def test_a_killed_copy_goes_on_to_the_same_store(sample_maker, tmp_path):
    """SIGKILL at several instants, then SIGINT; committed shards are not written again."""
    source = sample_maker(num_sequences=96).path
    options = ["--layers", "0,3", "--encoding", "int8"]
    assert command(source, tmp_path / "unbroken", *options).exit_code == 0
    unbroken = open_store(tmp_path / "unbroken").store_id
    target = tmp_path / "copy"
    committed: dict[Path, float] = {}
    script = [sys.executable, "-c", SIGNALLED]
    arguments = [str(source), str(target), *options]
    for left in (1, 40, random.Random(0).randrange(3, 9)):
        done = subprocess.run([*script, "SIGKILL", str(left), *arguments], check=False)
        assert done.returncode == -signal.SIGKILL
        assert not (target / "complete.json").exists()
        for record, written in committed.items():
            assert record.stat().st_mtime_ns == written
        committed = {r: r.stat().st_mtime_ns for r in target.glob("commits/[0-9]*.json")}
    assert committed
    done = subprocess.run(
        [*script, "SIGINT", "9", *arguments], check=False, capture_output=True, text=True
    )
    assert done.returncode == 130, done.stderr
    assert "finishing the shard in hand, then stopping" in done.stderr
    now = len(list(target.glob("commits/[0-9]*.json")))
    assert done.stderr.splitlines()[-1] == (
        f"stopped: {portion(now, 6, 'shard')} safe in {target}; run the same command to go on"
    )
    assert len(committed) < now < 6
    assert command(*arguments).exit_code == 0
    assert open_store(target).store_id == unbroken
    assert verify(target).problems == []


def test_a_source_that_changes_meanwhile_is_noticed(sample_maker, tmp_path, monkeypatch):
    """The copy is not completed: what it holds may be of two stores."""
    from mlsae.store.copying.rows import ChosenRows

    one, other = sample_maker("one").path, sample_maker("other", seed=1).path
    read = ChosenRows.read

    def read_and_swap(self: ChosenRows, start: int, stop: int) -> Any:
        if start == 0:
            one.rename(tmp_path / "away")
            other.rename(one)
        return read(self, start, stop)

    monkeypatch.setattr(ChosenRows, "read", read_and_swap)
    with pytest.raises(DamagedStoreError, match=r"one changed while it was copied; .* stays incom"):
        copied(one, tmp_path / "copy", layers=(0,))
    assert not (tmp_path / "copy/complete.json").exists()


def test_a_damaged_chunk_stops_a_copy(sample, tmp_path):
    """The chunk is named; the shards before it are kept."""
    shard = sample.path / "activations/resid_post/1/c.2.0"
    good = shard.read_bytes()
    shard.write_bytes(good[:10] + bytes([good[10] ^ 1]) + good[11:])
    refused(
        command(sample.path, tmp_path / "copy", "--layers", "1"),
        "1/c.2.0 (shard 2 of activations/resid_post/1) is damaged: the checksum of its chunk 0",
    )
    assert len(list((tmp_path / "copy/commits").glob("[0-9]*.json"))) == 2
    shard.write_bytes(good)
    assert command(sample.path, tmp_path / "copy", "--layers", "1").exit_code == 0


def test_parts_of_a_store_elsewhere(two_sites, tmp_path, web):
    """The store equals a copy from here; each wanted chunk is asked for once, no other ever."""
    shutil.copytree(two_sites, web.root / "mine")
    options = {"layers": (2,), "rows": (24, 888), "encoding": "int8"}
    here = copied(two_sites, tmp_path / "here", **options)
    there = copied(f"{web.url}/mine", tmp_path / "there", **options)
    assert here.store_id == there.store_id
    assert [note[:27] for note in there.notes] == ["provenance was not copied: "]
    web.faults.requests.clear()
    copied(f"{web.url}/mine", tmp_path / "layer", layers=(2,))
    asked = [
        (name, part)
        for _, name, part in web.faults.requests
        if name.startswith("mine/activations") and "/c." in name
    ]
    assert {name.split("/")[3] for name, _ in asked} == {"2"}
    assert len(set(asked)) == len(asked) > 10


def test_tokens_are_read_in_pieces(sample, tmp_path, monkeypatch):
    """A text may be longer than memory: none of its arrays is asked for whole."""
    for module in ("tokens", "setup"):
        monkeypatch.setattr(f"mlsae.store.write.{module}.BLOCK_TOKENS", 100)
    asked = []
    read = Store.tokens

    def tokens(self: Store, start: int = 0, stop: int | None = None) -> Any:
        asked.append((start, stop))
        return read(self, start, stop)

    monkeypatch.setattr(Store, "tokens", tokens)
    copied(sample.path, tmp_path / "copy", rows=(24, 480))
    assert max(stop - start for start, stop in asked) == 100
    assert min(asked)[0] == 24
    assert max(asked)[1] == 480
