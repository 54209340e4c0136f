"""docs/reference is what `make docs` makes of the code."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from mlsae.analyze.results.tables import TABLES

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _script() -> Any:
    spec = spec_from_file_location("make_docs", DOCS / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()


@pytest.mark.parametrize("page", SCRIPT.PAGES)
def test_a_page_is_made_from_the_code(page: str):
    """`make docs` would change nothing."""
    assert SCRIPT.PAGES[page]() == (DOCS / "reference" / page).read_text()


@pytest.mark.parametrize("table", TABLES)
def test_every_column_of_a_table_is_on_its_page(table: str):
    """By name, type, unit and definition; or as a bound of an interval, or a column of `layers`."""
    page = (DOCS / "reference" / "tables.md").read_text()
    section = page.partition(f"\n<!-- columns: {table} -->\n")[2].partition("<!-- end -->")[0]
    shown = {found[1]: found[0] for found in re.findall(r"^(\| `(\w+)` \|.*)$", section, re.M)}
    known = {column.name for column in TABLES["layers"]} if table == "overall" else set()
    for column in TABLES[table]:
        bound = re.fullmatch(r"(\w+)_(low|high)", column.name)
        if column.name in shown:
            text = column.text.replace("|", r"\|")
            row = f"| `{column.name}` | {column.type} | {column.unit} | {text} |"
            assert shown[column.name] == row
        else:
            assert (bound and f"`{bound[1]}`" in section) or column.name in known
    assert set(shown) <= {column.name for column in TABLES[table]}


def test_whatever_a_room_exports_is_on_the_page():
    """A heading for each name."""
    import importlib

    page = (DOCS / "reference" / "api.md").read_text()
    for room in SCRIPT.ROOMS:
        section = page.partition(f"\n## `mlsae.{room}`\n")[2].partition("\n## ")[0]
        names = re.findall(r"^### `(\w+)`$", section, re.M)
        assert sorted(names) == sorted(importlib.import_module(f"mlsae.{room}").__all__)
