"""The card of a store: what it says is so, what it shows runs, and damage is told from an edit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from mlsae.store import Calibrator, create, open_store
from mlsae.store.read.commits import LargestAddedFVU
from mlsae.store.tools.verify import verify
from mlsae.store.write.card import card_of
from mlsae.store.write.completion import complete
from mlsae.store.write.plan import make_plan
from mlsae.store.write.tokens import TokenArrays

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
HARVESTED = {
    "started": "2026-01-01T00:00:00+00:00",
    "model": {"name": "someone/some-model", "revision": "abc123"},
    "datasets": [{"name": "/home/somebody/texts/held_out.txt", "share": None}],
}


def front_matter(card: str) -> dict[str, object]:
    """The YAML at the top, as a hub reads it."""
    _, top, _ = card.split("---\n", 2)
    return yaml.safe_load(top)


def table(card: str) -> dict[str, str]:
    """The rows of its table."""
    return dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", card, re.M))


def calibrated(made) -> dict[str, object]:
    """Options of `create` for int8, from a sample's activations."""
    keys = [("resid_post", layer) for layer in made.activations]
    calibrator = Calibrator(keys, 20)
    calibrator.add({key: made.activations[key[1]][1:500] for key in keys})
    return {"encoding": "int8", "calibration": calibrator.result(), "max_added_fvu": 1.0}


def run_shown(path: Path, code: str, out: Path) -> dict[str, np.ndarray]:
    """Run a block beside a store in a process that has no mlsae; x and token_ids that it makes."""
    script = (
        f"import sys; sys.modules['mlsae'] = None\n{code}\n"
        f"import numpy; numpy.savez({str(out)!r}, x=x, token_ids=token_ids)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=path, check=True)
    return dict(np.load(out))


@pytest.mark.parametrize(
    ("encoding", "compression"),
    [
        ("float16", "none"),
        ("bfloat16", "zstd"),
        ("float32", "zstd"),
        ("int8", "none"),
        ("int8", "zstd"),
    ],
)
def test_what_a_card_shows_runs_and_gives_the_values(
    sample_maker, tmp_path, monkeypatch, encoding, compression
):
    """Every block, in the store's directory; each way gives what was put in."""
    options = {"encoding": encoding}
    if encoding == "int8":
        options = calibrated(sample_maker("plain", encoding="float32"))
    path = sample_maker("shown", compression=compression, shard_bytes=8000, **options).path
    blocks = BLOCK.findall((path / "README.md").read_text())
    assert [kind for kind, _ in blocks] == ["sh", "python", "python"]
    store = open_store(path)
    x, token_ids = store.read("resid_post", 0, 0, 888), store.tokens()
    monkeypatch.chdir(path)
    names: dict[str, np.ndarray] = {}
    exec(blocks[1][1], names)
    for shown in (names, run_shown(path, blocks[2][1], tmp_path / "out.npz")):
        assert shown["x"].shape == x.shape
        np.testing.assert_allclose(shown["x"], x, rtol=2e-6, atol=1e-6 * np.abs(x).max())
        np.testing.assert_array_equal(shown["token_ids"], token_ids)


def test_the_commands_of_a_card_run(sample):
    """In the store's directory."""
    _, commands = BLOCK.findall((sample.path / "README.md").read_text())[0]
    binaries = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": binaries}
    done = subprocess.run(
        ["bash", "-ec", commands],
        cwd=sample.path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert ". is sound: store_id" in done.stdout


def test_tokens_of_kept_positions_are_shown_by_row(tmp_path, monkeypatch):
    """Rows are then no longer tokens."""
    tokens = np.arange(80) * 3
    path = tmp_path / "a"
    with create(
        path, tokens=tokens, context_length=8, layers=(2,), d_model=4, keep_positions=3
    ) as writer:
        writer.append({("resid_post", 2): np.ones((30, 4), np.float32)})
    card = (path / "README.md").read_text()
    assert table(card)["rows of each layer"] == "30: 3 positions of each sequence, seed 0"
    expected = tokens[open_store(path).row_tokens()]
    _, (_, ours), (_, plain) = BLOCK.findall(card)
    monkeypatch.chdir(path)
    names: dict[str, np.ndarray] = {}
    exec(ours, names)
    for shown in (names, run_shown(path, plain, tmp_path / "out.npz")):
        np.testing.assert_array_equal(shown["token_ids"], expected)


def test_a_card_says_what_the_store_holds(sample_maker):
    """Model, text, sizes, ids; of a path on somebody's machine only the name."""
    made = sample_maker(provenance=HARVESTED, source={"license": "CC-BY-4.0"})
    card = (made.path / "README.md").read_text()
    store = open_store(made.path)
    named = [*(made.path / "activations").rglob("c.*"), *made.path.glob("*/c.*")]
    size = sum(path.stat().st_size for path in named)
    assert table(card) == {
        "model": "someone/some-model, revision abc123",
        "text": r"held\_out.txt",
        "tokens": "888 in 37 sequences of 24",
        "rows of each layer": "888",
        "layers (from 0)": "0–1, 3",
        "sites": r"resid_post",
        "channels (d_model)": "20",
        "encoding": "float16",
        "FVU that the encoding adds": table(card)["FVU that the encoding adds"],
        "size": f"{size / 1000:.3g} kB",
        "licence": "CC-BY-4.0",
        "schema": "1.0",
        "store_id": f"`{store.store_id}`",
        "plan_id": f"`{store.plan_id}`",
    }
    assert re.fullmatch(
        r"at most 2\.\d+e-06 in a shard of a layer, 4\.\d+e-06 in a decile of row norm",
        table(card)["FVU that the encoding adds"],
    )
    assert front_matter(card) == {
        "license": "cc-by-4.0",
        "pretty_name": "Activations of someone/some-model, revision abc123",
        "tags": ["activations", "sparse-autoencoder", "mlsae", "zarr"],
        "viewer": False,
    }


def test_a_card_is_written_where_nothing_is_known(sample):
    """No provenance, no licence."""
    card = (sample.path / "README.md").read_text()
    assert table(card)["model"] == "a model that was not named"
    assert table(card)["text"] == "not recorded"
    assert table(card)["licence"] == "not stated"
    assert front_matter(card)["license"] == "unknown"


@pytest.mark.parametrize(
    ("name", "shown", "title"),
    [
        ("a|b\n| x | y |", r"a\|b \| x \| y \|", "a|b | x | y |"),
        ('"]: {*<script>', r'"\]: \{\*\<script\>', '"]: {*<script>'),
        ("\ud800\u202e" + 500 * "n", 299 * "n" + "…", "Activations of " + 284 * "n" + "…"),
        ("mlsae-card -->", "mlsae-card --\\>", "mlsae-card -->"),
    ],
)
def test_words_of_others_stay_words(sample_maker, name, shown, title):
    """A name may hold anything; it becomes neither markup nor a key, and the card stays sound."""
    made = sample_maker(provenance={"model": {"name": name}, "license": f"my {name}"})
    card = (made.path / "README.md").read_text()
    assert table(card)["model"] == shown
    assert front_matter(card)["pretty_name"].endswith(title)
    assert front_matter(card)["license"] == "other"
    assert verify(made.path).problems == []


def test_equal_content_gives_equal_cards(sample_maker):
    """Whenever and wherever it was made; completing again changes nothing."""
    cards = []
    for name in ("a", "b"):
        made = sample_maker(name, provenance={**HARVESTED, "started": f"2026-0{len(cards) + 1}"})
        cards.append((made.path / "README.md").read_bytes())
        store = open_store(made.path)
        complete(made.path, store.plan)
        assert (made.path / "README.md").read_bytes() == cards[-1]
    assert cards[0] == cards[1]


def test_the_weights_and_the_shares_of_a_mixture_are_named():
    """Random weights must not pass for the trained ones."""
    plan = make_plan(
        TokenArrays(np.arange(8), None, None, 4),
        context_length=4,
        layers=[0],
        d_model=2,
        sites=["mlp_out"],
        encoding="float32",
        batch_sequences=1,
        shard_bytes=2**20,
        source={"model": {"init": "rerandomized", "init_seed": 7}},
        derived_from={"store_id": 64 * "e", "sequences": [8, 16], "encoding": "bfloat16"},
    )
    datasets = [{"name": "a/b", "share": 0.75}, {"name": "c", "share": 0.25}]
    cost = LargestAddedFVU(total=1.23e-5, site="mlp_out", layer=0, shard=0, decile=None)
    card = card_of(
        plan,
        store_id=64 * "2",
        num_bytes=10**9,
        cost=cost,
        provenance=[{"model": {"name": "old"}}, {"model": {"name": "m"}, "datasets": datasets}],
    )
    shown = table(card.decode())
    assert shown["model"] == "m, rerandomized weights, seed 7"
    assert shown["text"] == "a/b (share 0.75), c (share 0.25)"
    assert shown["FVU that the encoding adds"] == "at most 1.2e-05 in a shard of a layer"
    assert shown["made from"] == f"store {64 * 'e'}, sequences 8 to 16, in bfloat16"


def test_every_flipped_bit_of_a_card_is_found(sample):
    """In either mark, in the checksum, anywhere; R-CARD-1 names it."""
    card = sample.path / "README.md"
    data = card.read_bytes()
    marks = [m.start() for m in re.finditer(b"mlsae-card", data)]
    assert len(marks) == 2
    everywhere = range(0, len(data), 97)
    last_line = range(data.rfind(b"<!--"), len(data))
    first_mark = range(marks[0] - 3, marks[0] + 12)
    from mlsae.store.write.card import card_problem

    for at in (*everywhere, *last_line, *first_mark):
        for bit in (0, 3, 7):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            assert card_problem(bytes(flipped)), f"bit {bit} of byte {at}"
    for harm in (data[:-1], data + b"\n", data[: len(data) // 2], data[1:], data + data):
        card.write_bytes(harm)
        problems = verify(sample.path).problems
        assert [(p.rule, p.path) for p in problems] == [("R-CARD-1", "README.md")]
    assert problems[0].message == (
        "is not as it was written; if somebody edited it, take out its two lines with mlsae-card, "
        "else restore it from a copy"
    )


def test_a_card_may_be_edited_replaced_or_taken_away(sample):
    """Without its two marks it is the owner's; completing the store again leaves it alone."""
    card = sample.path / "README.md"
    lines = card.read_text().splitlines(keepends=True)
    edited = "".join(line for line in lines if "mlsae-card" not in line) + "Licence: see below.\n"
    store = open_store(sample.path)
    for text in (edited, "our data\n", ""):
        card.write_text(text)
        assert verify(sample.path).problems == []
        complete(sample.path, store.plan)
        assert card.read_text() == text
    card.unlink()
    assert verify(sample.path).problems == []
    card.write_bytes(b"mlsae-card" + bytes(2**24))
    assert verify(sample.path).problems == []


def test_a_store_with_a_missing_object_is_not_completed(sample):
    """A store without an object has no size to tell, and is none."""
    store = open_store(sample.path)
    (sample.path / "complete.json").unlink()
    (sample.path / "activations/resid_post/1/c.2.0").unlink()
    with pytest.raises(ValueError, match=r"1/c\.2\.0 is missing, but a record in .*commits names"):
        complete(sample.path, store.plan)
    assert not (sample.path / "complete.json").exists()
