"""docs/evidence/analysis.md: made from its JSON, whose numbers it shows."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

from mlsae.models.weights.initialization import INITS

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "docs" / "evidence"
STUDIES = ("variants", "sizes", "demo")
FIGURES = ("metrics", "layers", "heat", "decomposition", "similarity", "confound", "sizes")


@pytest.fixture
def content() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((EVIDENCE / "analysis.json").read_text())
    return loaded


@pytest.fixture
def page() -> str:
    return (EVIDENCE / "analysis.md").read_text()


@pytest.fixture
def make_page() -> Callable[[dict[str, Any]], str]:
    """The generator."""
    from benchmarks.analysis_page import analysis_page

    return analysis_page


def rows_after(page: str, words: str) -> list[list[str]]:
    """Cells of the first table after some words, without its head."""
    lines = page.partition(words)[2].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| "))
    rows = []
    for line in lines[first:]:
        if not line.startswith("| "):
            break
        rows.append(line[2:-2].split(" | "))
    return rows[2:]


def middle(cell: str) -> float:
    """The mean of a cell such as `0.12 (0.11–0.13)`."""
    text = cell.split(" ")[0]
    return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)


def of_init(content: dict[str, Any], init: str) -> list[dict[str, Any]]:
    return [sae for sae in content["variants"]["saes"] if sae["init"] == init]


def test_page_is_made_from_its_json(
    make_page: Callable[[dict[str, Any]], str], content: dict[str, Any], page: str
):
    """`make results-analysis` would change nothing."""
    assert make_page(content) == page


def test_json_is_as_the_script_writes_it(content: dict[str, Any]):
    """A list of numbers a line, so that a change of one is a change of one line."""
    from benchmarks.analysis import as_text

    assert as_text(content) == (EVIDENCE / "analysis.json").read_text()


def test_every_sae_is_on_the_page(
    make_page: Callable[[dict[str, Any]], str], content: dict[str, Any], page: str
):
    """Another FVU or another single-token variance of any SAE is another page."""
    for study in STUDIES:
        for sae in content[study]["saes"]:
            terms = sae["layer_variance"]["mass"]
            for holder, key in ((sae["layers"][1], "fvu"), (terms, "single_over_aggregate")):
                known = holder[key]
                holder[key] = known + 0.5
                assert make_page(content) != page, (study, sae["name"], key)
                holder[key] = known


def test_every_variant_has_three_seeds_of_one_setting(content: dict[str, Any]):
    """Five variants by three seeds; five shapes by two; three seeds of the demo."""
    saes = content["variants"]["saes"]
    assert [(s["init"], s["seed"]) for s in saes] == [(n, seed) for n in INITS for seed in range(3)]
    assert {(s["num_latents"], s["k"], s["num_sequences"]) for s in saes} == {
        (1024, 16, saes[0]["num_sequences"])
    }
    shapes = [(256, 16), (1024, 4), (1024, 16), (1024, 64), (4096, 16)]
    assert sorted((s["num_latents"], s["k"], s["seed"]) for s in content["sizes"]["saes"]) == [
        (*shape, seed) for shape in shapes for seed in range(2)
    ]
    assert [sae["seed"] for sae in content["demo"]["saes"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("title", "name", "digits"),
    [("Fraction of variance", "fvu", 3), ("Cosine of x", "cosine", 3), ("L1, sum", "l1", 2)],
)
def test_tables_by_layer_are_means_over_seeds(
    content: dict[str, Any], page: str, title: str, name: str, digits: int
):
    """Recomputed: each cell the mean over seeds, the brackets lowest and highest."""
    rows = rows_after(page, title)
    assert [row[0] for row in rows] == [f"`{init}`" for init in INITS]
    for init, (_, *cells) in zip(INITS, rows, strict=True):
        for layer, cell in enumerate(cells):
            values = [sae["layers"][layer][name] for sae in of_init(content, init)]
            assert middle(cell) == pytest.approx(mean(values), abs=0.51 * 10**-digits)
            if found := re.search(r"\((.+)–(.+)\)", cell):
                assert [float(found[1]), float(found[2])] == pytest.approx(
                    [min(values), max(values)], abs=0.51 * 10**-digits
                )


def test_decomposition_table_holds_its_identity(content: dict[str, Any], page: str):
    """single + tokens + latents = Var(L) to 1e-9 in the JSON, and the page has the ratios."""
    for study in STUDIES:
        for sae in content[study]["saes"]:
            for kind in ("mass", "pair_uniform"):
                of = sae["layer_variance"][kind]
                parts = of["single"] + of["tokens"] + of["latents"]
                assert parts == pytest.approx(of["total"], rel=1e-9)
            assert sae["recomputed_within"] < 1e-9
    rows = rows_after(page, "Terms in layer², by mass")
    for init, row in zip(INITS, rows, strict=False):
        for cell, kind in zip(row[6:9], ("mass", "pair_uniform", "as_coded"), strict=True):
            ratios = [
                sae["layer_variance"][kind]["single_over_aggregate"]
                for sae in of_init(content, init)
            ]
            assert middle(cell) == pytest.approx(mean(ratios), abs=5.1e-4)


def test_verdicts_on_claims_are_true_of_every_seed(content: dict[str, Any], page: str):
    """Recomputed for three claims: the control's error by depth, entropy rising, entropy high."""
    verdicts = {row[0]: row[-1] for row in rows_after(page, "point by point")}
    control = [[of["fvu"] for of in sae["layers"]] for sae in of_init(content, "control")]
    cosine = [[of["cosine"] for of in sae["layers"]] for sae in of_init(content, "control")]
    holds = [run[-1] > run[0] for run in control] + [run[-1] < run[0] for run in cosine]
    expected = "yes" if all(holds) else "in part" if any(holds) else "no"
    assert verdicts["The control's error rises with depth"] == expected
    entropy = {
        init: [
            [of["token_entropy_strongest"] for of in sae["layers"]]
            for sae in of_init(content, init)
        ]
        for init in INITS
    }
    rising = all((np.diff(run) >= 0).all() for run in entropy["trained"])
    assert (verdicts["Token entropy of trained rises with depth"] == "yes") == rising
    lowest = min(mean(run) for run in entropy["control"])
    highest = max(mean(run) for n in INITS if n != "control" for run in entropy[n])
    assert (verdicts["Token entropy of the control is high"] == "yes") == (lowest > highest)


def test_what_is_said_without_a_number_is_true(content: dict[str, Any]):
    """Random weights on both sides of the trained; likeness explains what is shared; the demo.

    These sentences are in the page whatever the JSON holds, so this is where they can go wrong.
    """
    from benchmarks.analysis_numbers import likeness_and_variance, mean_expected, pearson

    def by_mass(saes: list[dict[str, Any]]) -> list[float]:
        return [sae["layer_variance"]["mass"]["single_over_aggregate"] for sae in saes]

    trained = by_mass(of_init(content, "trained"))
    random = [by_mass(of_init(content, init)) for init in INITS if init != "trained"]
    assert any(max(of) < min(trained) for of in random)
    assert any(min(of) > max(trained) for of in random)
    assert max(trained) < 0.5 < min(by_mass(content["demo"]["saes"]))
    assert min(of for of in trained) > 0.05, "far from two orders of magnitude"
    assert pearson(*likeness_and_variance(content)) > 0.8
    for init in INITS:
        actual, other, covered = mean_expected(content["variants"], init)
        assert abs(actual - other) < 0.08
        assert covered > (0.2 if init == "control" else 0.9)


def test_figures_are_there_and_a_number_follows_each(page: str):
    """Every figure, small enough for a page, followed by a sentence that holds a number."""
    figures = re.findall(r"^!\[[^\]]+\]\(([^)]+)\)\n\n(.+?)\n\n", page, re.M | re.S)
    assert [name for name, _ in figures] == [f"analysis/{name}.png" for name in FIGURES]
    for name, sentence in figures:
        assert 10_000 < (EVIDENCE / name).stat().st_size < 150_000
        assert re.search(r"\d", sentence)


def test_json_says_how_it_was_made(content: dict[str, Any], page: str):
    """Commit, date, cost, and commands as they were run, of which the page shows some."""
    text = " ".join(page.replace("\\\n", " ").split())
    for name in STUDIES:
        study = content[name]
        assert re.fullmatch(r"[0-9a-f]{40}", study["commit"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", study["date"])
        assert set(study["seconds"]) == {"harvest", "train", "analyze"}
    for study, shown in (("variants", 2), ("demo", 3)):
        for command in content[study]["commands"][:shown]:
            assert command in text
    assert content["machine"]["cores"] >= 1


def test_likeness_is_weighed_by_the_pairs_of_one_token():
    """Bins with too few pairs left out, the others weighed as one token's pairs lie in them."""
    from benchmarks.analysis_numbers import expected

    run = {
        "edges": [0.0, 0.25, 0.5, 0.75],
        "one_token": {"pairs": [30, 60, 10], "shared": [3.0, 30.0, 9.0]},
        "one_layer": {"pairs": [100, 50, 500], "shared": [20.0, 20.0, 400.0]},
    }
    actual, other, covered = expected(run, "one_layer")
    assert actual == pytest.approx(33 / 90)
    assert other == pytest.approx((0.2 * 30 + 0.4 * 60) / 90)
    assert covered == pytest.approx(0.9)


def test_what_is_taken_from_events_is_what_brute_force_gives():
    """Decomposition, shared latents and entropies of a few random events."""
    from benchmarks.analysis_events import (
        Events,
        entropies,
        pairs,
        shared,
        single_over_aggregate,
        strongest,
    )

    generator = np.random.default_rng(0)
    num_tokens, num_latents, layers = 40, 7, (1, 2, 5)
    z = generator.random((len(layers), num_tokens, num_latents))
    z *= generator.random(z.shape) < 0.3
    events = {}
    for layer, of in zip(layers, z, strict=True):
        tokens, latents = np.nonzero(of)
        events[layer] = Events(tokens=tokens, latents=latents, values=of[tokens, latents])
    _, counts = pairs(events, num_latents)
    assert sorted(counts) == sorted(n for n in (z > 0).sum(axis=0).ravel() if n)

    position = np.array(layers, dtype=float)
    uniform = z / np.where(z.sum(axis=0) > 0, z.sum(axis=0), 1)
    found = single_over_aggregate(events, num_latents)
    for name, weights in (("mass", z), ("pair_uniform", uniform)):
        p = weights / weights.sum()
        single = aggregate = 0.0
        for j in range(num_latents):
            for t in range(num_tokens):
                if p[:, t, j].sum() > 0:
                    center = np.average(position, weights=p[:, t, j])
                    single += (p[:, t, j] * (position - center) ** 2).sum()
            by_layer = p[:, :, j].sum(axis=1)
            center = np.average(position, weights=by_layer)
            aggregate += (by_layer * (position - center) ** 2).sum()
        assert found[name] == pytest.approx(single / aggregate, rel=1e-12)

    first = shared(events, num_latents)[0]
    a, b = z[0] > 0, z[1] > 0
    assert first["layers"] == [1, 2]
    assert first["shared"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))

    ids = generator.integers(0, 4, num_tokens)
    of = events[2]
    ours = entropies(ids[of.tokens], of.latents, of.values, num_latents)
    for j in range(num_latents):
        mass = np.array([z[1][ids == n, j].sum() for n in range(4)])
        p = mass[mass > 0] / mass.sum()
        assert ours[j] == pytest.approx(-(p * np.log(p)).sum())
    chosen = strongest(of, 5)
    for j in range(num_latents):
        values = np.sort(of.values[of.latents == j])[::-1]
        top = np.sort(of.values[chosen & (of.latents == j)])[::-1]
        assert top.tolist() == (values[:5].tolist() if len(values) >= 5 else [])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_script_runs_on_the_demo_model(
    tmp_path: Path, demo_model: Path, make_page: Callable[[dict[str, Any]], str]
):
    """All three studies at tiny size, and again from what is there; page and figures come of it."""
    from benchmarks.analysis_figures import draw_all
    from mlsae.demo import text_path

    lines = text_path("held_out").read_text().splitlines()
    text = "".join(json.loads(line)["text"] for line in lines)
    pieces = [text[i : i + 600] for i in range(0, 120_000, 600)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in pieces))
    command = [
        sys.executable, "-m", "benchmarks.analysis", "--model", str(demo_model),
        "--dataset", str(tmp_path / "text.jsonl"), "--out", str(tmp_path / "out"),
        "--json", str(tmp_path / "analysis.json"), "--max-tokens", "20k", "--epochs", "1",
        "--batch-size", "1024", "--size-rows", "10k", "--demo-tokens", "16k",
        "--analyzed", "2k",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    first = json.loads((tmp_path / "analysis.json").read_text())
    assert all(len(first[name]["saes"]) == n for name, n in zip(STUDIES, (15, 10, 3), strict=True))
    assert make_page(first)
    drawn = draw_all(first, tmp_path / "figures")
    assert sorted(drawn) == sorted(f"{name}.png" for name in FIGURES)
    subprocess.run(command, cwd=ROOT, check=True)
    again = json.loads((tmp_path / "analysis.json").read_text())
    assert all(again[name]["saes"] == first[name]["saes"] for name in STUDIES)
