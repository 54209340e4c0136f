"""The queries of docs/queries.md: DuckDB and Polars give the same, and what numpy computes."""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsae.analyze import Analysis, AnalyzeConfig, load, run

PAGE = Path(__file__).parents[2] / "docs" / "queries.md"
QUESTION = re.compile(r"^### (?P<title>.+)\n(?P<text>(?:(?!^#).*\n)+)", re.M)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
Rows = list[tuple[Any, ...]]


@pytest.fixture(scope="module")
def analysis(
    world: Any, sae_maker: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Analysis:
    """Analysis of a small SAE, in a directory named as on the page."""
    out = tmp_path_factory.mktemp("queries") / "analysis"
    return run(
        AnalyzeConfig(
            cache=world.store,
            sae=sae_maker(world.store),
            out=out,
            rows="all",
            device="cpu",
            figures=False,
        )
    )


def _specific(analysis: Analysis) -> Rows:
    found = []
    for of in _by_latent(analysis):
        num_rows = sum(row["count"] for row in of)
        if num_rows >= 20:
            most = max(of, key=lambda row: row["prob"])
            found.append((most["latent"], most["layer"], most["prob"], num_rows))
    return sorted(found, key=lambda row: (-row[2], -row[3], row[0]))[:5]


def _by_latent(analysis: Analysis) -> list[list[dict[str, Any]]]:
    rows = defaultdict(list)
    for row in analysis.latent_layers.to_pylist():
        rows[row["latent"]].append(row)
    return list(rows.values())


def _events(analysis: Analysis) -> list[dict[str, Any]]:
    return list(analysis.events.to_table().to_pylist())


def _shared(analysis: Analysis) -> Rows:
    layers: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for event in _events(analysis):
        layers[event["latent"]][event["token"]] += 1
    found = [
        (latent, len(of), sum(n >= 2 for n in of.values()), max(of.values()))
        for latent, of in layers.items()
    ]
    return sorted(found, key=lambda row: (-row[2], row[0]))[:5]


def _most_frequent(analysis: Analysis) -> int:
    counts = analysis.latents["count"].to_numpy()
    return int(np.argmax(counts))


def _strongest(analysis: Analysis) -> Rows:
    latent = _most_frequent(analysis)
    found = [
        (event["token"], event["layer"], event["value"])
        for event in _events(analysis)
        if event["latent"] == latent
    ]
    return sorted(found, key=lambda row: (-row[2], row[0], row[1]))[:5]


def _by_layer(analysis: Analysis) -> Rows:
    events = _events(analysis)
    layers = np.array([event["layer"] for event in events])
    values = np.array([event["value"] for event in events])
    found = []
    for layer in np.unique(layers):
        here = layers == layer
        found.append((int(layer), int(here.sum()), here.mean(), values[here].sum() / values.sum()))
    return found


def _spread(analysis: Analysis) -> Rows:
    found = []
    for row, of in zip(analysis.latents.to_pylist(), _by_latent(analysis), strict=True):
        if row["count"] >= 20:
            most = max(of, key=lambda row: row["prob"])
            found.append(
                (row["latent"], row["layer_mean"], row["layer_std"], most["layer"], most["prob"])
            )
    return sorted(found, key=lambda row: (-row[2], row[0]))[:5]


def _fvu(analysis: Analysis) -> Rows:
    rows = [{**row, "over": str(row["layer"])} for row in analysis.layers.to_pylist()]
    rows += analysis.overall.to_pylist()
    return [(row["over"], row["fvu"], row["fvu_low"], row["fvu_high"]) for row in rows]


def _together(analysis: Analysis) -> Rows:
    places: dict[tuple[int, int], set[int]] = defaultdict(set)
    for event in _events(analysis):
        places[event["token"], event["layer"]].add(event["latent"])
    active = np.array([[n in of for n in range(len(analysis.latents))] for of in places.values()])
    one, counts = _most_frequent(analysis), active.sum(axis=0)
    both = (active & active[:, [one]]).sum(axis=0)
    both[one] = 0
    found = [
        (n, int(both[n]), both[n] * len(active) / (counts[n] * counts[one]))
        for n in np.flatnonzero(both).tolist()
    ]
    return sorted(found, key=lambda row: (-row[1], row[0]))[:5]


EXPECTED: dict[str, tuple[str, Callable[[Analysis], Rows]]] = {
    "The latents most specific to one layer": ("specific", _specific),
    "Latents active at several layers for one token": ("shared", _shared),
    "The strongest events of one latent": ("strongest", _strongest),
    "The share of events by layer": ("by_layer", _by_layer),
    "Latents with their layers": ("spread", _spread),
    "The FVU with its interval, by layer and over all": ("fvu", _fvu),
    "The latents that go with a latent": ("together", _together),
}
"""Title → name of the result, and the same by loops over rows."""


def _questions() -> dict[str, list[tuple[str, str]]]:
    """Title → its blocks: kind and content."""
    section = PAGE.read_text().split("## DuckDB and Polars\n")[1]
    return {found["title"]: BLOCK.findall(found["text"]) for found in QUESTION.finditer(section)}


def test_every_question_is_known() -> None:
    assert list(_questions()) == list(EXPECTED)


@pytest.mark.parametrize("title", list(EXPECTED))
def test_both_give_what_a_loop_over_the_rows_gives(
    title: str,
    analysis: Analysis,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And the output on the page has their columns, and rows."""
    monkeypatch.chdir(analysis.path.parent)
    name, compute = EXPECTED[title]
    expected = compute(load("analysis"))
    assert expected
    kinds = [kind for kind, _ in _questions()[title]]
    assert kinds == ["python", "python", ""]
    (_, duckdb), (_, polars), (_, shown) = _questions()[title]
    for code in (duckdb, polars):
        scope: dict[str, Any] = {}
        exec(code, scope)
        assert capsys.readouterr().out
        result = scope[name]
        rows = result.fetchall() if code is duckdb else result.rows()
        assert len(rows) == len(expected)
        for row, wanted in zip(rows, expected, strict=True):
            for cell, of in zip(row, wanted, strict=True):
                assert cell == (pytest.approx(of, rel=1e-6) if isinstance(of, float) else of)
        cells = [
            [cell.strip() for cell in line.strip("│").split("┆")]
            for line in shown.splitlines()
            if line.startswith("│")
        ]
        assert cells[0] == list(result.columns)
        assert len(cells) == 3 + int(shown.split("shape: (")[1].split(",")[0])
