"""Examples of a whole analysis: read back, with their text, printed, refused."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import mlsae.analyze.examples.table as example_table
from mlsae.analyze import Analysis, AnalyzeConfig, load, run
from mlsae.base.errors import InputError, ResourceError
from mlsae.cli import main
from mlsae.models import load_tokenizer
from mlsae.models.source import tokenizer as tokenizers
from mlsae.models.source.tokenizer import texts_of_tokens
from mlsae.sae import load as load_sae
from mlsae.store import open_store

LENGTH = 24


@pytest.fixture(scope="module")
def store(harvested: Callable[..., Path]) -> Path:
    """Encoded in int8, with 20 sequences of the demo transformer."""
    return harvested(encoding="int8", max_encoding_fvu=1.0)


@pytest.fixture(scope="module")
def analysis(
    store: Path, sae_maker: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Analysis:
    out = tmp_path_factory.mktemp("examples") / "out"
    patch = pytest.MonkeyPatch()
    patch.setattr(example_table, "ROW_GROUP", 64)
    try:
        return run(
            AnalyzeConfig(
                cache=store,
                sae=sae_maker(store, num_latents=300),
                out=out,
                rows="all",
                decomposition_max_tokens=5 * LENGTH,
                examples=3,
                samples=2,
                context_tokens=(4, 2),
                figures=False,
                device="cpu",
            )
        )
    finally:
        patch.undo()


def test_the_strongest_of_every_latent_are_those_of_the_dense_sae(
    analysis: Analysis, store: Path, dense: Callable[..., Any]
) -> None:
    """Values in float64, of all rows at once: more tokens than the decomposition looks at."""
    held = open_store(store)
    reference = dense(load_sae(Path(analysis.summary["sae"])))
    eligible = held.eligible(1)
    z = np.stack([reference.latents(held.read("resid_post", n).astype(np.float64)) for n in (0, 2)])
    z[:, ~eligible] = 0
    assert analysis.examples is not None
    rows = analysis.examples.to_table().to_pylist()
    for latent in range(300):
        mine = [row for row in rows if row["latent"] == latent]
        for kind, layers in (("top", (0, 2)), ("top_layer", (0,)), ("top_layer", (2,))):
            found = [row for row in mine if row["kind"] == kind and row["layer"] in layers]
            of_tokens = z[[(0, 2).index(n) for n in layers], :, latent].max(axis=0)
            values = np.sort(of_tokens)[::-1][:3]
            assert [row["value"] for row in found] == pytest.approx(
                values[values > 0].tolist(), rel=1e-4
            )
            assert [row["rank"] for row in found] == list(range(len(found)))
        for row in mine:
            near = z[:, row["token"], latent]
            assert row["layer_values"] == pytest.approx(near.tolist(), rel=1e-4, abs=1e-5)
            first = row["token"] - row["peak"]
            for n, value in enumerate(row["values"]):
                expected = z[(0, 2).index(row["layer"]), first + n, latent]
                assert (value is None) == (not eligible[first + n])
                assert value is None or value == pytest.approx(expected, rel=1e-4, abs=1e-5)
            if row["kind"] == "sample":
                quarter, n = z[:, :, latent].max() / 4, row["quantile"]
                assert row["low"] == pytest.approx(quarter * n, rel=1e-4)
                assert row["high"] == pytest.approx(quarter * (n + 1), rel=1e-4)
                assert row["low"] < row["value"] <= row["high"]
    assert analysis.summary["examples"] == {
        "top": 3,
        "ranges": 4,
        "samples": 2,
        "context_tokens": [4, 2],
        "seed": 0,
        "num_examples": len(rows),
        "no_text_because": None,
    }


def test_one_latent_is_read_without_the_others(analysis: Analysis) -> None:
    """Row groups hold whole latents, one after another."""
    metadata = pq.ParquetFile(analysis.path / "examples.parquet").metadata
    ranges = []
    for n in range(metadata.num_row_groups):
        statistics = metadata.row_group(n).column(0).statistics
        ranges.append((statistics.min, statistics.max))
    assert len(ranges) > 10
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))
    living = [row["latent"] for row in analysis.latents.to_pylist() if not row["dead"]]
    assert 0 < len(living) < 300
    for latent in (living[0], living[-1]):
        assert set(analysis.examples_of(latent)["latent"].to_pylist()) == {latent}
    dead = next(n for n in range(300) if n not in living)
    assert len(analysis.examples_of(dead)) == 0


def test_the_pieces_of_a_window_are_its_text(analysis: Analysis, demo_model: Path) -> None:
    tokenizer = load_tokenizer(demo_model)
    assert analysis.examples is not None
    for row in analysis.examples.to_table().to_pylist():
        text = tokenizer.decode(row["token_ids"], clean_up_tokenization_spaces=False)
        assert "".join(row["pieces"]) == text


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "wordpiece"])
def test_a_token_has_the_space_before_it_and_not_the_mark_of_its_tokenizer(
    kind: str,
) -> None:
    """For the decoders of GPT-2, Llama and BERT."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models

    vocabulary, decoder, expected = {
        "byte-level": ({"Ġthe": 0, "a": 1, "Ċ": 2, "Ã": 3}, decoders.ByteLevel(), " the"),
        "metaspace": ({"▁the": 0, "a": 1, "<0x0A>": 2, "<0xC3>": 3}, None, " the"),
        "wordpiece": ({"the": 0, "##a": 1, "\n": 2, "\N{REPLACEMENT CHARACTER}": 3}, None, " the"),
    }[kind]
    if kind == "wordpiece":
        inner = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="the"))
        inner.decoder = decoders.WordPiece(cleanup=False)
    else:
        inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        inner.decoder = decoder or decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    texts = texts_of_tokens(tokenizer, [0, 1, 2, 3])
    assert [text.strip(" ") for text in texts] == ["the", "a", "\n", "\N{REPLACEMENT CHARACTER}"]
    assert texts[:2] == [expected, "a"]


def test_text_is_missing_where_the_tokenizer_is_not_that_of_the_store(
    store: Path,
    sae_maker: Callable[..., Path],
    demo_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The model's weights are the same; its tokenizer lies beside them with two words swapped."""
    moved = tmp_path / "model"
    moved.mkdir()
    for file in demo_model.iterdir():
        (moved / file.name).symlink_to(file)
    tokenizer = json.loads((demo_model / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["self"], words["Ġthe"] = words["Ġthe"], words["self"]
    (moved / "tokenizer.json").unlink()
    (moved / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = run(
        AnalyzeConfig(
            cache=store,
            sae=sae_maker(store),
            out=tmp_path / "out",
            model=moved,
            examples=1,
            figures=False,
            device="cpu",
        )
    )
    reason = found.summary["examples"]["no_text_because"]
    printed = capsys.readouterr().out
    assert f"examples have token ids and no text: {reason}\n" in printed
    assert reason == f"the tokenizer of {moved} is not the one that made the store's tokens"
    assert found.examples is not None
    rows = found.examples.to_table().to_pylist()
    assert rows
    assert all(row["pieces"] is None for row in rows)
    latent = rows[0]["latent"]
    shown = CliRunner().invoke(main, ["examples", str(found.path), str(latent)]).output
    assert f"« {rows[0]['token_ids'][rows[0]['peak']]}»" in shown


def test_a_damaged_tokenizer_leaves_the_text_out(
    store: Path, sae_maker: Callable[..., Path], demo_model: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "model"
    shutil.copytree(demo_model, moved)
    content = (moved / "tokenizer.json").read_text()
    (moved / "tokenizer.json").write_text(content.replace('"self"', '"selfish"'))
    found = run(
        AnalyzeConfig(
            cache=store,
            sae=sae_maker(store),
            out=tmp_path / "out",
            model=moved,
            examples=1,
            figures=False,
            device="cpu",
        )
    )
    reason = found.summary["examples"]["no_text_because"]
    assert reason.startswith(f"the tokenizer of {moved} is damaged (Token `self` out of vocabulary")


def test_a_tokenizer_that_fails_leaves_the_text_out(
    store: Path, sae_maker: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some do for ids that they lack; the rows have been read by then."""

    def fail(*_: Any) -> list[str]:
        raise IndexError("piece id is\nout of range")

    monkeypatch.setattr(tokenizers, "texts_of_tokens", fail)
    found = run(
        AnalyzeConfig(
            cache=store,
            sae=sae_maker(store),
            out=tmp_path / "out",
            examples=1,
            figures=False,
            device="cpu",
        )
    )
    assert found.summary["examples"]["no_text_because"] == (
        "the tokenizer cannot decode all tokens (IndexError: piece id is out of range)"
    )
    assert found.examples is not None
    assert found.examples.count_rows() == found.summary["examples"]["num_examples"] > 0


def test_examples_are_printed_with_the_peak_marked(analysis: Analysis) -> None:
    latent = max(analysis.latents.to_pylist(), key=lambda row: int(row["num_layers"]))["latent"]
    done = CliRunner().invoke(main, ["examples", str(analysis.path), str(latent)])
    assert done.exit_code == 0
    rows = analysis.examples_of(latent).to_pylist()
    tops = [row for row in rows if row["kind"] == "top"]
    lines = done.output.split("strongest over all layers\n")[1].splitlines()
    assert lines[0].split() == ["value", "layer", "layers", "0–2"]
    for row, line in zip(tops, lines[1:], strict=False):
        value, layer = line.split()[:2]
        assert (value, int(layer)) == (f"{row['value']:.4g}", row["layer"])
        before, peak, after = (
            "".join(row["pieces"][part])
            for part in (
                slice(0, row["peak"]),
                slice(row["peak"], row["peak"] + 1),
                slice(row["peak"] + 1, None),
            )
        )
        assert f"{before}«{peak}»{after}".replace("\n", "⏎") in line
    assert re.search(r"drawn from above [\d.]+ to [\d.]+", done.output)


def test_layer_and_limit_choose_what_is_printed(analysis: Analysis) -> None:
    latent = max(analysis.latents.to_pylist(), key=lambda row: int(row["count"]))["latent"]
    command = ["examples", str(analysis.path), str(latent), "--layer", "2", "--limit", "2"]
    output = CliRunner().invoke(main, command).output
    strongest = output.split("strongest at layer 2\n")[1].split("\n\n")[0].splitlines()[1:]
    values = [
        f"{row['value']:.4g}"
        for row in analysis.examples_of(latent).to_pylist()
        if row["kind"] == "top_layer" and row["layer"] == 2
    ]
    assert [line.split()[0] for line in strongest] == values[:2]
    assert all(line.split()[1] == "2" for line in strongest)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["300"], "there is no latent 300: the SAE has 300, from 0 to 299"),
        (["--", "-1"], "there is no latent -1: the SAE has 300, from 0 to 299"),
        (["3", "--layer", "1"], "the SAE has no layer 1: its layers are 0, 2"),
    ],
)
def test_what_there_is_not_is_said_in_one_line(
    words: list[str], message: str, analysis: Analysis
) -> None:
    done = CliRunner().invoke(main, ["examples", str(analysis.path), *words])
    assert done.exit_code == 1
    assert done.output == f"Error: {message}\n"


def test_a_latent_that_was_never_active_is_said_to_be_dead(analysis: Analysis) -> None:
    dead = next(row["latent"] for row in analysis.latents.to_pylist() if row["dead"])
    done = CliRunner().invoke(main, ["examples", str(analysis.path), str(dead)])
    assert done.exit_code == 0
    assert done.output == f"latent {dead}: active for none of the rows evaluated\n"


def test_an_analysis_without_examples_has_no_table_and_says_so(
    store: Path, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    sae, out = sae_maker(store), tmp_path / "out"
    command = ["analyze", "--cache", str(store), "--sae", str(sae), "--out", str(out)]
    done = CliRunner().invoke(
        main, [*command, "--examples", "0", "--no-figures", "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    assert not (out / "examples.parquet").exists()
    found = load(out)
    assert found.examples is None
    assert found.summary["examples"] is None
    done = CliRunner().invoke(main, ["examples", str(out), "0"])
    assert done.exit_code == 1
    assert done.output == (
        f"Error: the analysis {out} was made without examples: analyze again with --examples "
        f"above 0\n"
    )


def test_a_missing_table_is_a_damaged_analysis(analysis: Analysis, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(analysis.path, out)
    (out / "examples.parquet").unlink()
    with pytest.raises(InputError, match=r"the analysis .*out is damaged .*: make it again"):
        load(out)


def test_examples_that_fit_no_memory_are_refused_before_the_work(
    store: Path, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    config = AnalyzeConfig(
        cache=store, sae=sae_maker(store), out=tmp_path / "out", examples=10**9, device="cpu"
    )
    with pytest.raises(
        ResourceError,
        match=r"not enough memory for the examples of 48 latents at 2 layers: needs [\d.]+ TB, "
        r"[\d.]+ GB available; lower --examples, --samples or --context-tokens",
    ):
        run(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--context-tokens", "1,2,3", "expected tokens before and after, such as 8,4, got '1,2,3'"),
        ("--context-tokens", "8,x", "expected a number of items such as 10M, 1e7 or 16384"),
        ("--examples", "-1", "expected a number of items such as 10M, 1e7 or 16384, got '-1'"),
    ],
)
def test_settings_that_are_none_are_usage_errors(option: str, value: str, message: str) -> None:
    words = ["analyze", "--cache", "a", "--sae", "b", "--out", "c", option, value]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"examples": -1}, "--examples must be at least 0, got -1"),
        ({"samples": -2}, "--samples must be at least 0, got -2"),
        (
            {"context_tokens": (1, -1)},
            r"--context-tokens must be two numbers of at least 0, got \(1, -1\)",
        ),
    ],
)
def test_the_configuration_is_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AnalyzeConfig(cache="a", sae=Path("b"), out=Path("c"), **changes)
