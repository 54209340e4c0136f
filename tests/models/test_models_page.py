"""The table of families in docs/models.md is what the models do."""

import re
from collections.abc import Callable
from pathlib import Path

from mlsae.base.words import SITES
from mlsae.models import Transformer
from mlsae.models.sites import anatomies

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def test_the_table_has_every_tested_family_with_its_form_and_sites(
    family_names: list[str], make_family: Callable[[str], Transformer]
) -> None:
    _, _, after = PAGE.read_text().partition("| Family | Form | Sites | Notes |\n")
    table, _, _ = after.partition("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[1:]]
    assert [row[0] for row in rows] == family_names
    for family, form, sites, notes in rows:
        transformer = make_family(family)
        absent = re.findall(r"`(\w+)`", sites)
        assert sites == "all" or sites == f"all but `{absent[0]}`"
        assert ("encoder" in notes) == (transformer.kind == "encoder")
        for anatomy in anatomies(transformer):
            assert anatomy.form == form, family
            assert set(anatomy.taps) == set(SITES) - set(absent), family
