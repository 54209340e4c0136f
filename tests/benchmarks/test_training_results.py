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
"""Studies that the script knows; the page has those that its JSON has."""


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
    """Another FVU of any SAE of the sweep is another page."""
    for sae in content["sweep"]["saes"]:
        known = sae["fvu"]
        sae["fvu"] = known + 0.5
        assert make_page(content) != page, sae["name"]
        sae["fvu"] = known


def test_table_of_the_sweep_has_all_of_it(content: dict[str, Any], page: str):
    """Every size and k, its mean over layers at each rate, and the best rate where it is inside."""
    rows = rows_of(page, "FVU against L0")
    found = {
        (sae["num_latents"], sae["k"], sae["lr"]): mean(sae["fvu_by_layer"])
        for sae in content["sweep"]["saes"]
    }
    sizes, ks, rates = ((256, 1024, 4096), (4, 16, 64), (1e-3, 3e-3, 1e-2))
    assert sorted(found) == [(n, k, lr) for n in sizes for k in ks for lr in rates]
    assert [(int(row[0].replace(",", "")), int(row[1])) for row in rows] == [
        (n, k) for n in sizes for k in ks
    ]
    for latents, k, *cells, best, _, _ in rows:
        of = [found[int(latents.replace(",", "")), int(k), lr] for lr in rates]
        assert [float(cell) for cell in cells] == pytest.approx(of, abs=5.1e-5)
        assert (best == "inside") is (min(of) == of[1])


def test_figures_are_there_and_a_number_follows_each(page: str):
    """A figure a study, followed by a sentence that holds a number."""
    figures = re.findall(r"^!\[[^\]]+\]\(([^)]+)\)\n\n(.+?)\n\n", page, re.M | re.S)
    assert len(figures) == page.count("![") > 0
    for name, sentence in figures:
        assert (EVIDENCE / name).stat().st_size > 10_000
        assert re.search(r"\d", sentence)


def test_json_says_how_it_was_made(content: dict[str, Any], page: str):
    """Commit, date, cost, and the commands as they were run, which the page shows."""
    for study in (content[name] for name in STUDIES if name in content):
        assert re.fullmatch(r"[0-9a-f]{40}( with uncommitted changes)?", study["commit"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", study["date"])
        assert study["seconds"] > 0
        for command in study["commands"]:
            assert command in " ".join(page.replace("\\\n", " ").split())
        assert study["machine"]["cores"] >= 1


def test_study_of_scalings_is_whole_and_its_fvu_that_of_its_mse(content: dict[str, Any]):
    """4 scalings, 3 rates, 4 weights; MSE over FVU is the variance of a layer, the same for all."""
    saes = content["mlp"]["saes"]
    assert len({(s["layer_scale"], s["lr"], s["l1_weight"]) for s in saes}) == len(saes) == 48
    for layer in range(5):
        variances = [sae["mse"][layer] / sae["fvu"][layer] for sae in saes]
        assert variances == pytest.approx([variances[0]] * 48, rel=1e-6)


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
