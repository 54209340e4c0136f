"""Damaged objects are named wherever they are met, and hide nothing else."""

from pathlib import Path

import pytest

from mlsae.store import DamagedStoreError, open_store
from mlsae.store.tools.verify import verify


def flip(file: Path, at: int = 7) -> None:
    """Turn a bit over."""
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def test_damaged_flags_do_not_hide_a_damaged_shard(sample):
    """Without flags a row has no group, and so no moments; hashes are looked at all the same."""
    flip(sample.path / "token_flags/c.0")
    flip(sample.path / "activations/resid_post/3/c.1.0")
    found = {(problem.rule, problem.path) for problem in verify(sample.path).problems}
    assert found == {
        ("R-COMMIT-4", "token_flags/c.0"),
        ("R-COMMIT-4", "activations/resid_post/3/c.1.0"),
    }
    with pytest.raises(DamagedStoreError, match=r"shard 0 of token_flags\) is damaged"):
        open_store(sample.path).eligible()
