"""Errors of the network library, recorded as its texts were, and what a reader is told of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlsae.store.places.failures import understand

RECORDED = json.loads(Path(__file__).with_name("obstore_errors.json").read_text())["samples"]


@pytest.mark.parametrize("sample", RECORDED, ids=lambda sample: sample["means"]["cause"][:40])
def test_a_recorded_error_is_understood(sample: dict[str, Any]) -> None:
    """Cause and remedy, and whether a second try may help."""
    found = understand(Exception(sample["text"]), "CREDENTIALS")
    assert {name: getattr(found, name) for name in sample["means"]} == sample["means"]


def test_an_unknown_error_is_shown_by_its_first_line_and_not_tried_again() -> None:
    found = understand(Exception("Generic S3 error: a new kind\nof error\0"), "CREDENTIALS")
    assert (found.cause, found.passes) == ("a new kind", False)
    assert found.remedy == "check the address and the server"
