"""Every command in README and docs is run here, or says why not."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
IMPORTED = (
    "datasets",
    "torch._dynamo",
    "transformers.models.auto.modeling_auto",
    "mlsae.analyze.pipeline",
    "mlsae.harvest.pipeline",
    "mlsae.train.pipeline",
)
"""Modules that most commands of a page import."""
SERVED = {ROOT / "docs/sharing.md"}
"""Pages that need servers; tests/house/test_sharing.py runs them."""
BEGINNING = """\
mlsae harvest --model demo --dataset demo --max-tokens 20k --context-length 128 --out acts
mlsae train --cache acts --out sae -R 4 -k 8 --validation-fraction 0.1
mlsae analyze --cache acts --sae sae --out analysis
"""
"""Beginning of several pages: run once, and each of them goes on in a copy."""
REASON = r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?"
BLOCK = re.compile(REASON + r"^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    code: str
    reason: str | None
    """Why it is not run."""


def blocks(page: Path) -> list[Block]:
    """Shell and Python blocks of a page, in order."""
    found = [
        Block(match["kind"], match["code"], match["reason"])
        for match in BLOCK.finditer(page.read_text())
    ]
    return [block for block in found if block.kind in {"sh", "bash", "console", "python"}]


@pytest.fixture(scope="module")
def shell(forking: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Options of a shell whose commands need not import torch and transformers each anew."""
    # As the command line says before torch is imported.
    environment = {"GOMP_SPINCOUNT": "5000", "MPLBACKEND": "agg"}
    with forking.importing(*IMPORTED, environment=environment) as processes:
        yield processes.shell(tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="session")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the common beginning was run, as README has it, in plain processes."""
    path = tmp_path_factory.mktemp("begun")
    binaries = Path(sys.executable).parent
    run([BEGINNING], path, env={**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"})
    return path


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page not in SERVED],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_command_of_a_page_runs_as_written(
    page: Path, tmp_path: Path, shell: dict[str, Any], request: pytest.FixtureRequest
):
    """All blocks of a page in one shell, in an empty directory, stopping at the first failure."""
    script = []
    for block in blocks(page):
        if block.reason is not None:
            assert len(block.reason.split()) > 2, f"{page}: {block.reason!r} is no reason"
        elif block.kind == "python":
            script.append(f"python - <<'END_OF_BLOCK'\n{block.code}END_OF_BLOCK")
        else:
            script.append(block.code)
    if script and script[0].startswith(BEGINNING):
        shutil.copytree(request.getfixturevalue("begun"), tmp_path, dirs_exist_ok=True)
        script[0] = script[0].removeprefix(BEGINNING)
    run(script, tmp_path, **shell)


def run(script: list[str], directory: Path, **options: Any) -> None:
    done = subprocess.run(
        ["bash", "-c", "\n".join(["set -euo pipefail", *script])],
        cwd=directory,
        **options,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_the_common_beginning_is_common():
    """README and the quick start are among the pages that begin so; others run their own."""
    first = {p: next((b.code for b in blocks(p) if b.reason is None), "") for p in PAGES}
    common = {page.name for page, code in first.items() if code.startswith(BEGINNING)}
    assert common >= {"README.md", "quickstart.md"}
    assert len(common) >= 5


def test_there_are_commands_to_run():
    """The pattern above finds blocks, and most of them are run."""
    found = [block for page in PAGES for block in blocks(page)]
    assert len(found) > 5
    assert sum(block.reason is None for block in found) > len(found) / 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_of_a_page_are_there(page: Path):
    """Relative links point to files of the checkout, and to headings of pages."""
    for target, _, heading in re.findall(r"\]\(([^)#\s]*)(#([^)\s]+))?\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            assert not heading or heading in headings(file), f"{page.name}: {target}#{heading}"


def headings(page: Path) -> set[str]:
    """Names of a page's headings in links."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}
