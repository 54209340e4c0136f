import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "docs" / "evidence"


@pytest.fixture(scope="module")
def results() -> ModuleType:
    """The script behind `make results`; benchmarks is no package."""
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((EVIDENCE / "stories260k.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def page() -> str:
    return (EVIDENCE / "stories260k.md").read_text()


def test_page_is_made_from_its_json(results: ModuleType, content: dict[str, Any], page: str):
    """`make results` would change nothing."""
    assert results.stories260k(content) == page


def test_another_number_would_change_the_page(results: ModuleType, content: dict[str, Any]):
    """The page shows the JSON's numbers, not numbers of its own."""
    altered = json.loads(json.dumps(content))
    for run in altered["runs"]:
        run["layers"][2]["fvu_position_0_in"] += 0.5
    assert results.stories260k(altered) != results.stories260k(content)


def test_fvu_of_the_first_table_is_the_mean_over_seeds(content: dict[str, Any], page: str):
    """The first table, recomputed: each loss space's mean over three seeds, and no latent dead."""
    rows = re.findall(r"^\| (raw|standardized) \| (\d) \| (0\.\d{4}) \| ", page, re.M)
    layers = content["store"]["layers"]
    assert [int(row[1]) for row in rows] == [*layers, *layers]
    for space, layer, mean in rows:
        of = [run for run in content["runs"] if run["loss_space"] == space]
        assert sorted(run["seed"] for run in of) == [0, 1, 2]
        fvu = sum(run["layers"][int(layer)]["fvu_position_0_in"] for run in of) / 3
        assert float(mean) == pytest.approx(fvu, abs=5.1e-5)
        assert all(run["num_dead"] == 0 for run in of)


def test_json_says_how_it_was_made(content: dict[str, Any]):
    """Command, clean commit, date, machine, and three seeds in each loss space."""
    assert content["command"].startswith("python -m benchmarks.stories260k ")
    assert re.fullmatch(r"[0-9a-f]{40}", content["commit"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", content["date"])
    assert content["machine"]["cores"] >= 1
    made = sorted((run["loss_space"], run["seed"]) for run in content["runs"])
    assert made == [(space, seed) for space in ("raw", "standardized") for seed in (0, 1, 2)]


def test_every_figure_is_there_and_a_number_follows_it(page: str):
    """Each figure is a committed file, followed by a sentence that holds a number."""
    figures = re.findall(r"^!\[[^\]]+\]\(([^)]+)\)\n\n(.+?)\n\n", page, re.M | re.S)
    assert len(figures) == page.count("![") == 5
    for name, sentence in figures:
        assert (EVIDENCE / name).is_file()
        assert re.search(r"\d", sentence)


def test_harvest_page_is_made_from_its_json(results: ModuleType):
    """`make results` would change nothing, and another norm would show."""
    content = json.loads((EVIDENCE / "harvest.json").read_text())
    assert results.harvest_page(content) == (EVIDENCE / "harvest.md").read_text()
    content["texts"]["WikiText-2"][3]["mean_norm"][2] += 0.5
    assert results.harvest_page(content) != (EVIDENCE / "harvest.md").read_text()


def test_harvest_page_shows_every_variant_on_both_texts():
    """Five initialisations a text, norms that differ by text but for the control's noise."""
    texts = json.loads((EVIDENCE / "harvest.json").read_text())["texts"]
    assert sorted(texts) == ["TinyStories", "WikiText-2"]
    for variants in texts.values():
        assert [variant["init"] for variant in variants] == [
            "trained", "rerandomized", "rerandomized-keep-embeddings", "random", "control",
        ]  # fmt: skip
        assert (EVIDENCE / "harvest" / "norm_cosine.png").stat().st_size > 10_000


def test_the_page_of_benchmarks_is_made_from_its_json(results: ModuleType):
    """Every benchmark with its script, its command and the tables that it shows."""
    content = json.loads((EVIDENCE / "benchmarks.json").read_text())
    assert results.benchmarks_page(content) == (EVIDENCE / "benchmarks.md").read_text()
    for benchmark in content:
        assert (ROOT / benchmark["script"]).is_file()
    content[0]["tables"][0]["rows"][0][1] += "0"
    assert results.benchmarks_page(content) != (EVIDENCE / "benchmarks.md").read_text()


def test_tables_of_the_scale_page_are_computed():
    """docs/how-large.md shows what the layout and the stated rates give."""
    from benchmarks.scale_paper import CASES, hours, tables

    page = (ROOT / "docs" / "how-large.md").read_text()
    assert tables() in page
    llama = CASES[0]
    # 2 bytes · 10⁸ tokens · 32 layers · 4,096 channels at 0.6 · 2 GB/s, a tenth more.
    assert hours(llama, None, 2e9, 1)[0] == pytest.approx(26.2144e12 / 1.2e9 * 1.1 / 3600)
