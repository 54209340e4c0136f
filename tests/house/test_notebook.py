"""The notebook of examples/ does what its stored outputs say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "latents.ipynb"
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def printed(notebook: Path) -> str:
    """Text that all cells wrote, on stdout and nowhere else."""
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    streams = [output for output in outputs if output["output_type"] == "stream"]
    assert {output["name"] for output in streams} == {"stdout"}
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    return "".join("".join(output["text"]) for output in streams)


def pictures(notebook: Path) -> list[str]:
    return [
        output["data"]["image/png"]
        for cell in code_cells(notebook)
        for output in cell["outputs"]
        if output["output_type"] == "display_data"
    ]


def check_same(text: str, stored: str) -> None:
    """Words and shapes are equal, other numbers as near as another machine's rounding allows."""
    assert NUMBER.sub("#", text) == NUMBER.sub("#", stored)
    assert re.findall(r"\([^)]*\)", text) == re.findall(r"\([^)]*\)", stored)
    for found, expected in zip(NUMBER.findall(text), NUMBER.findall(stored), strict=True):
        if "." in expected:
            assert float(found) == pytest.approx(float(expected), abs=0.03)
        else:
            assert int(found) == pytest.approx(int(expected), rel=0.1, abs=3)


def test_the_code_prints_what_the_notebook_shows(tmp_path: Path):
    """All code cells in order, as one plain script."""
    code = "\n".join("".join(cell["source"]) for cell in code_cells(NOTEBOOK))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "agg", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check_same(done.stdout, printed(NOTEBOOK))


def test_the_notebook_is_stored_as_executed():
    """Every cell once, from the first to the last, with its picture."""
    cells = code_cells(NOTEBOOK)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert len(pictures(NOTEBOOK)) == 1
    code = "".join("".join(cell["source"]) for cell in cells)
    for line in ("sae = mlsae.sae.load(", "latents = sae.encode(x)", "sae.decode(latents)"):
        assert line in code


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel(tmp_path: Path):
    """As `jupyter execute --inplace examples/latents.ipynb` runs it, which also renews it."""
    copy = tmp_path / "latents.ipynb"
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    copy.write_text(json.dumps(content), encoding="utf-8")
    done = subprocess.run(
        [Path(sys.executable).with_name("jupyter"), "execute", "--inplace", copy.name],
        cwd=tmp_path,
        # The kernel sets how figures are drawn; tqdm asks for widgets, and does without.
        env={
            **{key: value for key, value in os.environ.items() if key != "MPLBACKEND"},
            "PYTHONWARNINGS": "ignore:IProgress not found",
            "TMPDIR": str(tmp_path),
            "IPYTHONDIR": str(tmp_path / "ipython"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check_same(printed(copy), printed(NOTEBOOK))
    assert len(pictures(copy)) == 1
