import contextlib
import io
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mlsae.analyze import Analysis
from mlsae.base.errors import InputError
from mlsae.demo.walk import stage_settings, walk

README = Path(__file__).parents[2] / "README.md"
NUMBER = re.compile(r"\s*\d[\d,.]*")


@dataclass(frozen=True)
class Walked:
    """A walk over a few sequences."""

    out: Path
    analysis: Analysis
    printed: str


def small_walk(out: Path) -> Walked:
    """A short walk without figures, which have tests of their own."""
    to_harvest, to_train, to_analyze = stage_settings(out)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        analysis = walk(
            replace(to_harvest, max_tokens=8_192, device="cpu"),
            replace(to_train, epochs=1, batch_size=1024, device="cpu"),
            replace(to_analyze, device="cpu", figures=False),
        )
    return Walked(out, analysis, printed.getvalue())


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Walked:
    return small_walk(tmp_path_factory.mktemp("demo") / "a run")


def table(printed: str) -> list[str]:
    """Lines from the table by layer on."""
    lines = printed.splitlines()
    return lines[lines.index("layer     FVU     PCA  delta CE    L0  dead latents") :]


def test_walk_ends_with_the_table_and_the_page(walked: Walked) -> None:
    """A row for each of six layers, then the page, which is there."""
    lines = table(walked.printed)
    rows = [line.split() for line in lines[1:7]]
    assert [int(row[0]) for row in rows] == list(range(6))
    for row, expected in zip(rows, walked.analysis.layers.to_pylist(), strict=True):
        assert float(row[1]) == pytest.approx(expected["fvu"], abs=1e-4)
        assert float(row[2]) == pytest.approx(expected["fvu_pca"], abs=1e-4)
        assert float(row[3]) == pytest.approx(expected["delta_ce"], abs=1e-3)
    (page,) = [line for line in lines if line.startswith("page ")]
    assert Path(page.split(maxsplit=1)[1]) == walked.analysis.page
    assert walked.analysis.page.is_file()


def test_walking_again_keeps_store_and_sae(walked: Walked) -> None:
    """A second walk adds only its own provenance to the store, and prints the same table."""

    def contents() -> dict[Path, bytes]:
        kept = [*(walked.out / "acts").rglob("*"), *(walked.out / "sae").rglob("*")]
        return {
            path: path.read_bytes()
            for path in kept
            if path.is_file() and path.parent.name != "provenance"
        }

    before = contents()
    again = small_walk(walked.out)
    assert contents() == before
    assert table(again.printed) == table(walked.printed)


def test_walk_refuses_a_directory_of_other_things(tmp_path: Path) -> None:
    """The file in the way is named and left alone."""
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        small_walk(tmp_path)
    assert [path.name for path in (tmp_path / "acts").iterdir()] == ["notes.txt"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_demo_ends_with_the_table_of_readme(tmp_path: Path) -> None:
    """Numbers of another machine's rounding; the same layers and the same words."""
    _, _, shown = README.read_text().partition("```text\n")
    table = shown.partition("```")[0].splitlines()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        walk(*stage_settings(tmp_path))
    lines = printed.getvalue().splitlines()
    found = lines[lines.index(table[0]) :][: len(table)]
    assert re.sub(NUMBER, "#", "\n".join(found)) == re.sub(NUMBER, "#", "\n".join(table))
    for line, expected in zip(found[1:7], table[1:7], strict=True):
        figures, wanted = ([float(cell) for cell in of.split()[1:5]] for of in (line, expected))
        assert figures == pytest.approx(wanted, rel=0.05, abs=0.02)
