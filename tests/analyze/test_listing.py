"""`mlsae latents`: choosing, sorting, printing and writing latents of an analysis."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from mlsae.analyze import Analysis, AnalyzeConfig, run
from mlsae.analyze.results.text.listing import SHOWN, choose
from mlsae.cli import main

LATENTS = pa.table(
    {
        "latent": [0, 1, 2, 3, 4],
        "density": [0.5, 0.1, 0.5, 0.0, 0.1],
        "layer_mean": [1.0, 3.0, 2.0, None, 0.5],
    }
)


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        (None, [0, 1, 2, 3, 4]),
        ("density", [3, 1, 4, 0, 2]),
        ("-density", [0, 2, 1, 4, 3]),
        ("layer_mean", [4, 0, 2, 1, 3]),
        ("-layer_mean", [1, 2, 0, 4, 3]),
        ("-latent", [4, 3, 2, 1, 0]),
    ],
)
def test_sorting_keeps_ties_in_order_and_nulls_last(sort: str | None, expected: list[int]) -> None:
    assert choose(LATENTS, sort=sort)["latent"].to_pylist() == expected


def test_condition_sort_limit_and_columns_together() -> None:
    found = choose(
        LATENTS, condition="density > 0", sort="-layer_mean", limit=2, columns=["density", "latent"]
    )
    assert found.to_pylist() == [{"density": 0.1, "latent": 1}, {"density": 0.5, "latent": 2}]


@pytest.fixture(scope="module")
def analysis(
    world: Any, sae_maker: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Analysis:
    """An analysis of 160 latents."""
    directory = sae_maker(world.store, num_latents=160)
    out = tmp_path_factory.mktemp("listing") / "out"
    return run(AnalyzeConfig(figures=False, cache=world.store, sae=directory, out=out))


def _latents(analysis: Analysis, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["latents", str(analysis.path), *options])
    return done.exit_code, done.output


def test_latents_are_printed_as_a_table(analysis: Analysis) -> None:
    code, text = _latents(analysis, "--where", "not dead", "--sort", "-count", "--limit", "3")
    assert code == 0
    lines = text.splitlines()
    assert lines[0].split() == list(SHOWN)
    alive = [row for row in analysis.latents.to_pylist() if not row["dead"]]
    top = sorted(alive, key=lambda row: (-row["count"], row["latent"]))[:3]
    assert [line.split()[:2] for line in lines[1:4]] == [
        [str(row["latent"]), str(row["count"])] for row in top
    ]
    assert lines[1].split()[2] == f"{top[0]['density']:.4g}"
    assert lines[-1] == f"{len(alive)} of 160 latents, 3 of them shown"


def test_twenty_are_printed_unless_more_are_asked_for(analysis: Analysis) -> None:
    code, text = _latents(analysis, "--columns", "latent, dead,layer_mean")
    assert code == 0
    assert len(text.splitlines()) == 1 + 20 + 2
    dead = next(row["latent"] for row in analysis.latents.to_pylist() if row["dead"])
    assert [str(dead), "true", "–"] in [line.split() for line in text.splitlines()]
    assert text.splitlines()[-1] == "160 of 160 latents, 20 of them shown"
    assert len(_latents(analysis, "--limit", "1k")[1].splitlines()) == 1 + 160 + 2


def test_latents_are_written_with_every_column(analysis: Analysis, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "few.parquet"
    code, text = _latents(analysis, "--where", "num_layers >= 2", "--out", str(out))
    assert code == 0
    found = pq.read_table(out)
    expected = [row for row in analysis.latents.to_pylist() if row["num_layers"] >= 2]
    assert found.to_pylist() == expected
    assert found.schema.equals(analysis.latents.schema, check_metadata=True)
    assert text == (f"{len(expected)} of 160 latents, {len(expected)} of them written to {out}\n")
    code, text = _latents(analysis, "--out", str(out))
    assert (code, text) == (1, f"Error: --out {out} exists already: give another name\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "densty > 1"], "--where: there is no column 'densty'; there are latent, cou"),
        (["--sort", "-densty"], "--sort: there is no column 'densty'; there are latent, count, "),
        (["--columns", "latent,"], "--columns: there is no column ''; there are latent, count, "),
        (["--limit", "few"], "expected a number of items such as 10M, 1e7 or 16384, got 'few'"),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_one_line(
    analysis: Analysis, options: list[str], message: str
) -> None:
    code, text = _latents(analysis, *options)
    assert code in {1, 2}
    assert message in text.splitlines()[-1]


def test_a_directory_without_an_analysis(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["latents", str(tmp_path)])
    assert done.exit_code == 1
    assert done.output == (
        f"Error: {tmp_path} is no analysis: it has no summary.json; make one with mlsae analyze\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--columns", "latent,latent"), "--columns: the column 'latent' is given twice; give eac"),
        (("--out", "x.csv"), "--out x.csv would be a Parquet file: give a name that ends in .parq"),
    ],
)
def test_columns_twice_and_other_kinds_of_files_are_refused(
    analysis: Analysis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, output = _latents(analysis, *options)
    assert (status, message in output) == (1, True), output
    assert list(tmp_path.iterdir()) == []
