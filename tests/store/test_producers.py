"""Shards of different hardware or versions meet in one store only where somebody allowed it."""

import re
from pathlib import Path

import numpy as np
import pytest

from mlsae.base.files import read_sealed
from mlsae.store import MixedProducersError, Writer, create, open_store, resume
from mlsae.store.tools.info import store_info
from mlsae.store.tools.verify import verify

CPU = {"device": "cpu", "torch": "2.8.0"}
GPU = {"device": "NVIDIA H200", "torch": "2.8.0"}
MESSAGE = re.escape(
    "shard 0 was made by device cpu, torch 2.8.0, this process is device NVIDIA H200, torch 2.8.0, "
    "and the last bits of their values may differ; go on with the same device and versions, or "
    "allow it with --allow-mixed-hardware"
)
ROWS = {("resid_post", 0): np.ones((8, 4), np.float32)}


def begin(path: Path, **options) -> Writer:
    """Three shards of eight rows each."""
    return create(
        path,
        tokens=np.arange(24),
        context_length=8,
        layers=(0,),
        d_model=4,
        shard_bytes=64,
        **options,
    )


def test_another_producer_is_refused_at_once(tmp_path: Path):
    """By create and by resume, naming both; the same one goes on."""
    with begin(tmp_path / "a", producer=CPU) as writer:
        writer.append(ROWS)
    assert read_sealed(tmp_path / "a/commits/00000.json")["producer"] == CPU
    with pytest.raises(MixedProducersError, match=MESSAGE):
        begin(tmp_path / "a", producer=GPU)
    with pytest.raises(MixedProducersError, match=MESSAGE):
        resume(tmp_path / "a", producer=GPU)
    with pytest.raises(MixedProducersError, match=r"this process is \(not recorded\)"):
        resume(tmp_path / "a")
    with resume(tmp_path / "a", producer=dict(reversed(CPU.items()))) as writer:
        writer.append(ROWS)
        writer.append(ROWS)
    # Nothing is left to be mixed.
    assert resume(tmp_path / "a", producer=GPU).position is None
    assert verify(tmp_path / "a").problems == []


def test_another_producer_that_turns_up_meanwhile_stops_the_writer(tmp_path: Path):
    """The other's shard is seen when one's own is committed, and when one waits for the others."""
    ours = begin(tmp_path / "a", producer=GPU)
    waiting = begin(tmp_path / "a", producer=GPU)
    with begin(tmp_path / "a", producer=CPU) as theirs:
        theirs.append(ROWS)
    ours.seek(1)
    ours.append(ROWS)
    with pytest.raises(MixedProducersError, match=MESSAGE):
        ours.close()
    with pytest.raises(MixedProducersError, match=MESSAGE):
        waiting.pending()
    assert resume(tmp_path / "a", allow_mixed=True).pending() == [1, 2]


def test_a_mixture_that_is_allowed_is_named_by_info(tmp_path: Path):
    """And has the identity that it would have anyway."""
    with begin(tmp_path / "a", producer=CPU) as writer:
        writer.append(ROWS)
    with begin(tmp_path / "a", producer=GPU, allow_mixed=True) as writer:
        writer.append(ROWS)
        writer.append(ROWS)
    with begin(tmp_path / "b", producer=CPU) as writer:
        for _ in range(3):
            writer.append(ROWS)
    assert open_store(tmp_path / "a").store_id == open_store(tmp_path / "b").store_id
    assert verify(tmp_path / "a").problems == []
    mixed, plain = (store_info(tmp_path / name) for name in "ab")
    assert mixed.producers == ((CPU, 1), (GPU, 2))
    assert "  made by     device NVIDIA H200, torch 2.8.0: 2 shards" in str(mixed)
    assert "  made by     device cpu, torch 2.8.0: 3 shards" in str(plain)
