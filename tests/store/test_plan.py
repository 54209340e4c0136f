"""The plan as a type: its JSON, its identity, and the sizes and names that follow from it."""

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from mlsae.base.files import canonical_json
from mlsae.store.format.calibration import Calibrator
from mlsae.store.plan import PLAN_KEYS, Plan
from mlsae.store.plancheck import check_plan
from mlsae.store.write.plan import make_plan
from mlsae.store.write.tokens import TokenArrays

LENGTH, SEQUENCES, KEPT = 8, 6, 3


@pytest.fixture(params=["float16", "int8"])
def plan(request: pytest.FixtureRequest) -> Plan:
    """With two sites, kept positions and compressed chunks."""
    keys = [(site, layer) for site in ("attn_out", "mlp_out") for layer in (0, 2)]
    calibrator = Calibrator(keys, 70)
    calibrator.add({key: np.ones((4, 70), np.float32) for key in keys})
    return make_plan(
        TokenArrays(np.arange(LENGTH * SEQUENCES), None, None, LENGTH),
        context_length=LENGTH,
        layers=[0, 2],
        d_model=70,
        sites=["attn_out", "mlp_out"],
        encoding=request.param,
        batch_sequences=2,
        shard_bytes=2000,
        source={"model": {"name": ("a", "b")}},
        keep_positions=KEPT,
        keep_seed=5,
        compression="zstd",
        calibration=calibrator.result() if request.param == "int8" else None,
    )


def test_a_plan_is_its_json(plan: Plan) -> None:
    """Read back it is equal, tuples of the producer's included, and it cannot be changed."""
    record = plan.to_json()
    assert record.keys() == PLAN_KEYS
    assert check_plan(record, "acts") == plan
    assert check_plan(record, "acts").id == plan.id
    assert plan.source == {"model": {"name": ["a", "b"]}}
    with pytest.raises(FrozenInstanceError):
        plan.d_model = 3  # type: ignore[misc]


def test_keys_that_a_reader_passes_by_belong_to_the_identity(plan: Plan) -> None:
    """A later minor version only adds them, and a copy must have the same id."""
    record = plan.to_json() | {"hint": {"must_understand": False}}
    later = check_plan(record, "acts")
    assert canonical_json(later.to_json()) == canonical_json(record)
    assert later.id != plan.id
    assert later.differences(plan) == ["hint: {'must_understand': False} there, absent here"]


def test_a_difference_names_the_leaf_and_hashes_come_last(plan: Plan) -> None:
    """Another plan is compared whole, keys that are asked for by themselves."""
    other = replace(plan, d_model=71, tokens_sha256="0" * 64)
    assert [line.split(":")[0] for line in plan.differences(other)] == ["d_model", "tokens_sha256"]
    assert plan.differences({"keep_positions": {"num": 4, "seed": 5}}) == [
        "keep_positions.num: 3 there, 4 here"
    ]


def test_shards_cover_the_rows_and_name_every_object(plan: Plan) -> None:
    """In the order of sites, layers and parts."""
    assert plan.num_rows == SEQUENCES * KEPT
    rows = [row for number in range(plan.num_shards) for row in plan.shard(number)]
    assert rows == list(range(plan.num_rows))
    arrays = [spec for key in plan.keys for spec in plan.activation_arrays(*key)]
    assert len(arrays) == 4 * len(plan.parts)
    last = plan.num_shards - 1
    assert plan.shard_objects(last) == [f"{spec.name}/c.{last}.0" for spec in arrays]
    named = {name.rpartition("/")[0] for name in plan.metadata()}
    assert {spec.name for spec in plan.arrays} <= named
