"""The queries of docs/queries.md run, and files have the columns that the reference has."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mlsae.analyze import AnalyzeConfig, run
from mlsae.analyze.results.figures.registry import FIGURES
from mlsae.analyze.results.tables import TABLES

PAGE = Path(__file__).parents[2] / "docs" / "queries.md"


def test_the_queries_run_on_an_analysis_and_the_files_have_the_documented_columns(
    world: Any,
    sae_maker: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run(
        AnalyzeConfig(
            figures=False, cache=world.store, sae=sae_maker(world.store), out=Path("analysis")
        )
    )
    for table, columns in TABLES.items():
        path = tmp_path / "analysis" / f"{table}.parquet"
        part = next(path.with_suffix("").rglob("*.parquet"), path)
        schema = pq.read_schema(part)
        assert schema.names == [column.name for column in columns]
        assert schema.types == [column.type for column in columns]
    section = PAGE.read_text().split("\n## DuckDB")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        capsys.readouterr()
        scope: dict[str, Any] = {}
        exec(block, scope)
        assert capsys.readouterr().out
        if "spread" in scope:
            stds = scope["spread"]["layer_std"].to_pylist()
            assert len(stds) == 10
            assert stds == sorted(stds, reverse=True)
        if "events" in scope:
            assert set(scope["events"]["latent"].to_pylist()) == {scope["latent"]}
        if "shared" in scope:
            assert len(scope["shared"]) == _shared_by_loop()


def _shared_by_loop() -> int:
    here, above = (
        {tuple(event.values()) for event in table.to_pylist()}
        for table in (
            pq.read_table(f"analysis/events/layer-{layer}", columns=["row", "latent"])
            for layer in (0, 1)
        )
    )
    return len(here & above)


def test_reading_an_analysis_needs_neither_torch_nor_transformers() -> None:
    script = (
        "import sys, mlsae.analyze; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_every_figure_is_documented_by_the_line_that_draws_it() -> None:
    page = PAGE.with_name("look-at-an-analysis.md").read_text()
    lines = re.findall(r'^\| `analysis\.figure\("(\w+)"\)` \| .{10}', page, re.MULTILINE)
    assert lines == [*FIGURES, "prompt_0"]
