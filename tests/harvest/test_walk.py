"""From text to an analysis with the real commands: encodings change hardly anything."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from mlsae.analyze import Analysis, load
from mlsae.cli import main

ENCODINGS = ("float16", "int8", "float16-zstd")


def mlsae(command: str, *arguments: str) -> None:
    result = CliRunner().invoke(main, [command, *arguments])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def analyses(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Analysis]:
    """Encoding → the analysis of an SAE that was trained on it."""
    from mlsae.demo import text_path

    found = {}
    for encoding in ENCODINGS:
        out = tmp_path_factory.mktemp(encoding)
        acts, sae, analysis = (str(out / name) for name in ("acts", "sae", "analysis"))
        mlsae(
            "harvest", "--model", str(demo_model), "--dataset", str(text_path("train")), "--out",
            acts, "--context-length", "128", "--max-tokens", "16k", "--batch-size", "32",
            "--layers", "1,4", "--encoding", encoding, "--device", "cpu",
        )  # fmt: skip
        mlsae(
            "train", "--cache", acts, "--out", sae, "--num-latents", "128", "-k", "8", "--epochs",
            "3", "--batch-size", "512", "--lr", "1e-3", "--validation-fraction", "0.1",
            "--device", "cpu",
        )  # fmt: skip
        mlsae(
            "analyze", "--cache", acts, "--sae", sae, "--out", analysis, "--max-tokens", "1k",
            "--no-figures", "--device", "cpu",
        )  # fmt: skip
        found[encoding] = load(analysis)
    return found


def columns(analysis: Analysis, *names: str) -> list[list[float]]:
    return [analysis.layers[name].to_pylist() for name in names]


def test_compression_changes_nothing(analyses: dict[str, Analysis]) -> None:
    assert analyses["float16-zstd"].layers.equals(analyses["float16"].layers)


def test_int8_changes_hardly_anything(analyses: dict[str, Analysis]) -> None:
    """The SAE leaves a third of the variance unexplained; int8 adds a few in 100,000."""
    floats, int8 = (columns(analyses[name], "fvu", "fvu_published") for name in ("float16", "int8"))
    assert min(floats[0]) > 0.2
    assert max(floats[0]) < 0.5
    for ours, theirs in zip(int8, floats, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3)
    ce, ce_store = columns(analyses["int8"], "ce", "ce_store")
    assert ce_store == pytest.approx(ce, abs=2e-3)
