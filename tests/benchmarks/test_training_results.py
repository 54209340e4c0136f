"""docs/evidence/training.md: made from its JSON, whose numbers it shows."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from mlsae.store import open_store
from mlsae.store.copying.copy import CopyConfig, copy

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "docs" / "evidence"
STUDIES = ("sweep", "layers", "tokens", "mlp")


@pytest.fixture
def content() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((EVIDENCE / "training.json").read_text())
    return loaded


@pytest.fixture
def page() -> str:
    return (EVIDENCE / "training.md").read_text()


@pytest.fixture
def make_page() -> Callable[[dict[str, Any]], str]:
    """The generator."""
    from benchmarks.training_page import training_page

    return training_page


def rows_of(page: str, title: str) -> list[list[str]]:
    """Cells of the first table of a section, without its head."""
    section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| (.+) \|$", section, re.M)
    return [line.split(" | ") for line in lines[2:]]


def test_page_is_made_from_its_json(
    make_page: Callable[[dict[str, Any]], str], content: dict[str, Any], page: str
):
    """`make results-training` would change nothing."""
    assert make_page(content) == page


def test_every_sae_is_on_the_page(
    make_page: Callable[[dict[str, Any]], str], content: dict[str, Any], page: str
):
    """Another FVU of any SAE of the first three studies at any layer is another page."""
    for study in ("sweep", "layers", "tokens"):
        for sae in content[study]["saes"]:
            for layer, known in enumerate(sae["fvu_by_layer"]):
                sae["fvu_by_layer"][layer] = known + 0.5
                assert make_page(content) != page, (study, sae["name"], layer)
                sae["fvu_by_layer"][layer] = known


def test_table_of_the_sweep_has_all_of_it(content: dict[str, Any], page: str):
    """k 4 to 64 at three sizes, each with its mean over layers."""
    rows = rows_of(page, "FVU against L0")
    saes = {(sae["num_latents"], sae["k"]): sae for sae in content["sweep"]["saes"]}
    assert sorted(saes) == [(n, k) for n in (256, 1024, 4096) for k in (4, 8, 16, 32, 64)]
    assert len(rows) == len(saes)
    for latents, k, fvu, *by_layer, _ in rows:
        sae = saes[int(latents.replace(",", "")), int(k)]
        assert [float(cell) for cell in by_layer] == pytest.approx(sae["fvu_by_layer"], abs=5.1e-5)
        assert float(fvu) == pytest.approx(mean(sae["fvu_by_layer"]), abs=5.1e-5)


def test_sentences_on_layers_are_true_of_every_seed(content: dict[str, Any], page: str):
    """Recomputed: where the multi-layer SAE of equal total latents beats every other seed."""
    saes = content["layers"]["saes"]
    lower = []
    for layer in range(5):
        ours = fvus(saes, [0, 1, 2, 3, 4], 1280, layer)
        theirs = fvus(saes, [layer], 256, 0)
        assert len(ours) == len(theirs) == 3
        if max(ours) < min(theirs):
            lower.append(str(layer))
    beginning = "At equal total latents.*?lower, whichever the seeds, at layers ([^;.]+)"
    said = re.search(beginning, page, re.S)
    assert said is not None
    assert re.findall(r"\d", said[1]) == lower


def fvus(saes: list[dict[str, Any]], layers: list[int], num_latents: int, at: int) -> list[float]:
    """FVU of each seed, at the given one of the SAE's layers."""
    return [
        sae["fvu_by_layer"][at]
        for sae in saes
        if sae["layers"] == layers and sae["num_latents"] == num_latents
    ]


def test_figures_are_there_and_a_number_follows_each(page: str):
    """A figure a study, followed by a sentence that holds a number."""
    figures = re.findall(r"^!\[[^\]]+\]\(([^)]+)\)\n\n(.+?)\n\n", page, re.M | re.S)
    assert len(figures) == page.count("![") == len(STUDIES)
    for name, sentence in figures:
        assert (EVIDENCE / name).stat().st_size > 10_000
        assert re.search(r"\d", sentence)


def test_json_says_how_it_was_made(content: dict[str, Any], page: str):
    """Commit, date, cost, and the commands as they were run, which the page shows."""
    for name in STUDIES:
        study = content[name]
        assert re.fullmatch(r"[0-9a-f]{40}( with uncommitted changes)?", study["commit"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", study["date"])
        assert study["seconds"] > 0
        for command in study["commands"]:
            assert command in " ".join(page.replace("\\\n", " ").split())
    assert content["machine"]["cores"] >= 1


def test_study_of_scalings_is_whole_and_its_fvu_that_of_its_mse(content: dict[str, Any]):
    """4 scalings, 3 rates, 4 weights; MSE over FVU is the variance of a layer, the same for all."""
    saes = content["mlp"]["saes"]
    assert len({(s["layer_scale"], s["lr"], s["l1_weight"]) for s in saes}) == len(saes) == 48
    for layer in range(5):
        variances = [sae["mse"][layer] / sae["fvu"][layer] for sae in saes]
        assert variances == pytest.approx([variances[0]] * 48, rel=1e-6)


def test_guide_to_how_many_tokens_has_the_measured_ratios(content: dict[str, Any]):
    """The guide's table, recomputed: held-out FVU over that with all text, by size and part."""
    guide = (ROOT / "docs" / "how-large.md").read_text()
    rows = rows_of(guide, "Tokens that training wants")
    saes = content["tokens"]["saes"]
    assert [row[0] for row in rows] == ["28,160", "56,320", "112,640", "225,280", "450,560"]
    for tokens, epochs, *ratios in rows:
        for size, ratio in zip((256, 1024), ratios, strict=True):
            of = {
                n: mean(
                    mean(sae["fvu_by_layer"])
                    for sae in saes
                    if (sae["num_latents"], sae["epochs"]) == (size, n)
                )
                for n in (1, int(epochs))
            }
            assert float(ratio) == pytest.approx(of[int(epochs)] / of[1], abs=5.1e-3)
        assert {s["unique_tokens"] for s in saes if s["epochs"] == int(epochs)} == {
            int(tokens.replace(",", ""))
        }


def test_guide_to_how_many_tokens_has_the_bytes_of_models():
    """layers · d_model times 2, or times 65/64, and how many of these a terabyte holds."""
    guide = (ROOT / "docs" / "how-large.md").read_text()
    numbers = {"pythia-70m": 6 * 512, "pythia-410m": 24 * 1024, "Llama-3-8B": 32 * 4096}
    rows = rows_of(guide, "Tokens that disk affords")
    assert [row[0] for row in rows] == list(numbers)
    for model, *cells in rows:
        plain, int8 = numbers[model] * 2, numbers[model] * 65 / 64
        expected = [plain / 1e3, 1e12 / plain / 1e6, int8 / 1e3, 1e12 / int8 / 1e6]
        for cell, value in zip(cells, expected, strict=True):
            digits = len(cell.split()[0].partition(".")[2])
            assert float(cell.split()[0]) == round(value, digits), (model, cell)


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_part_that_holds_held_out_sequences_is_refused(
    sample_maker: Callable[..., Any], tmp_path: Path, overlap: int
):
    """One sequence too many in a part, and the script that looks for that stops."""
    from benchmarks.training_measure import Part, check_held_out

    store = open_store(sample_maker(num_sequences=120, context_length=24).path)
    per = store.context_length
    documents = store.documents()
    # The first border between sequences that no document crosses.
    border = next(i for i in range(60, 119) if documents[i * per - 1] != documents[i * per])
    for name, start, stop in (("held", border, 120), ("part", 0, border + overlap)):
        rows = (start * per, stop * per)
        copy(CopyConfig(source=str(store.place), target=str(tmp_path / name), rows=rows))
    parts = [Part(1, tmp_path / "part", tmp_path / "none")]
    if overlap:
        with pytest.raises(AssertionError):
            check_held_out(store, tmp_path / "held", (border, 120), parts)
    else:
        counts = check_held_out(store, tmp_path / "held", (border, 120), parts)
        assert counts["num_held_out"] == 120 - border
        assert counts["num_between"] == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_script_runs_on_the_demo_model(
    tmp_path: Path, demo_model: Path, make_page: Callable[[dict[str, Any]], str]
):
    """All four studies at tiny size, and again at once; the page and the figures come of it."""
    from mlsae.demo import text_path

    lines = text_path("held_out").read_text().splitlines()
    text = "".join(json.loads(line)["text"] for line in lines)
    pieces = [text[i : i + 600] for i in range(0, 60_000, 600)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in pieces))
    command = [
        sys.executable, "-m", "benchmarks.training", "--model", str(demo_model),
        "--dataset", str(tmp_path / "text.jsonl"), "--out", str(tmp_path / "out"),
        "--json", str(tmp_path / "training.json"), "--max-tokens", "16k", "--rows", "4k",
        "--mlp-rows", "4k", "--batch-size", "1024",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    first = json.loads((tmp_path / "training.json").read_text())
    assert [name for name in first if name in STUDIES] == list(STUDIES)
    assert len(first["mlp"]["saes"]) == 48
    assert all((tmp_path / "training" / f"{name}.png").is_file() for name in STUDIES)
    assert make_page(first)
    # Validation rows, measured here and by training itself.
    summary = json.loads((tmp_path / "out" / "mlp" / "summary.json").read_text())["saes"]
    for ours, theirs in zip(first["mlp"]["saes"], summary, strict=True):
        assert ours["fvu"] == pytest.approx(theirs["fvu_by_layer"], rel=1e-3)
    subprocess.run(command, cwd=ROOT, check=True)
    again = json.loads((tmp_path / "training.json").read_text())
    assert all(again[name]["saes"] == first[name]["saes"] for name in STUDIES)
