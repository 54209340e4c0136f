"""A run is deaf to variables that shells, notebooks and platforms leave in the environment."""

import os
from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, PartialState

from mlsae.base.errors import InputError
from mlsae.train.running.devices import make_accelerator

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate reads the environment once a process."""
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    before = PartialState._shared_state.copy(), AcceleratorState._shared_state.copy()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._shared_state.update(before[0])
    AcceleratorState._shared_state.update(before[1])


@pytest.mark.parametrize(
    "variables",
    [
        {"LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"ACCELERATE_MIXED_PRECISION": "fp8"},
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"},
        {"ACCELERATE_TORCH_DEVICE": "meta"},
    ],
    ids=lambda variables: "+".join(variables),
)
def test_a_single_process_is_one(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the variables are there afterwards."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    accelerator = make_accelerator("cpu")
    assert (accelerator.num_processes, accelerator.device.type) == (1, "cpu")
    assert accelerator.mixed_precision == "no"
    assert all(os.environ[name] == value for name, value in variables.items())


def test_several_processes_need_all_variables_of_their_launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line names what is there and what is not, before anything is waited for."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError) as error:
        make_accelerator("cpu")
    assert str(error.value) == (
        "WORLD_SIZE=4 is set, as where several processes were started, but RANK, LOCAL_RANK, "
        "MASTER_ADDR, MASTER_PORT are not: unset WORLD_SIZE for one process, or start several "
        "with torchrun"
    )
