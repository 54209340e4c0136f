"""The SAE directory: a round trip, and one line for each way it can be wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mlsae.base.errors import InputError
from mlsae.base.files import read_sealed, seal
from mlsae.sae import SAE, Architecture, DamagedSAEError, NotAnSAEError, SAEConfig, TopK, load

TRAINING = {"store_id": "ab", "layers": [0, 2], "metrics": {"fvu": 0.25}}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    sae = SAE(
        SAEConfig(d_in=8, num_latents=32, architecture=TopK(4)), torch.Generator().manual_seed(0)
    )
    sae.save(tmp_path / "sae", TRAINING)
    return tmp_path / "sae"


def test_load_gives_back_what_was_saved(directory: Path) -> None:
    """Weights bit for bit, configuration, training record; ready to encode."""
    sae = SAE(
        SAEConfig(d_in=8, num_latents=32, architecture=TopK(4)), torch.Generator().manual_seed(0)
    )
    loaded = load(directory)
    assert loaded.config == sae.config
    assert loaded.training_record == TRAINING
    assert not loaded.training
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    x = torch.randn(5, 8)
    assert torch.equal(loaded(x), sae(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_sae_of_another_dtype_comes_back_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """As `load` says; the directory may be text."""
    sae = SAE(SAEConfig(d_in=8, num_latents=32, architecture=TopK(4))).to(dtype)
    sae.save(str(tmp_path / "sae"), TRAINING)
    loaded = load(str(tmp_path / "sae"))
    assert loaded.W_enc.dtype == loaded.b.dtype == torch.float32
    assert torch.equal(loaded.W_enc, sae.W_enc.float())


def test_loading_draws_no_weights(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing needs them, and to draw them without memory takes a second of imports."""
    monkeypatch.delattr(Architecture, "initial")
    assert load(directory).W_enc.shape == (32, 8)


def test_nothing_else_is_left_in_the_directory(directory: Path) -> None:
    """Three files, no temporary ones."""
    names = {path.name for path in directory.iterdir()}
    assert names == {"sae.safetensors", "config.json", "training.json"}


@pytest.mark.parametrize("name", ["sae.safetensors", "config.json", "training.json"])
def test_one_flipped_bit_is_damage(directory: Path, name: str) -> None:
    """Any byte of any file is covered by a checksum."""
    data = bytearray((directory / name).read_bytes())
    data[len(data) // 2] ^= 1
    (directory / name).write_bytes(data)
    with pytest.raises(DamagedSAEError, match=f"{name} is damaged") as caught:
        load(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["sae.safetensors", "training.json"])
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    """The directory was copied in part."""
    (directory / name).unlink()
    with pytest.raises(DamagedSAEError, match=f"{name} is missing"):
        load(directory)


def test_a_directory_without_config_is_no_sae(directory: Path, tmp_path: Path) -> None:
    """Absent, or something else: two texts."""
    (directory / "config.json").unlink()
    with pytest.raises(NotAnSAEError, match=r"is no SAE directory: it has no config\.json"):
        load(directory)
    with pytest.raises(NotAnSAEError, match=r"there is no SAE at .*absent: no such directory"):
        load(tmp_path / "absent")


def test_a_sweep_lists_its_saes(directory: Path, tmp_path: Path) -> None:
    """Some of many; each is a directory to be given."""
    sweep = tmp_path / "sweep"
    for n in range(6):
        shutil.copytree(directory, sweep / f"k{n}")
    with pytest.raises(NotAnSAEError) as caught:
        load(sweep)
    assert str(caught.value) == (
        f"there is no SAE at {sweep} itself but in folders of it: give one of {sweep}/k0, "
        f"{sweep}/k1, {sweep}/k2, {sweep}/k3 and 2 more"
    )


def test_the_sae_of_another_tool_is_refused(directory: Path) -> None:
    """A config.json without our architecture is foreign, not damaged."""
    (directory / "config.json").write_text(json.dumps({"d_in": 8, "d_sae": 32}))
    with pytest.raises(NotAnSAEError, match="does not describe an SAE of mlsae"):
        load(directory)


def test_unknown_and_missing_keys_are_named(directory: Path) -> None:
    """A setting this version does not know may change what the SAE computes."""
    path = directory / "config.json"
    content = read_sealed(path)
    path.write_bytes(seal({**content, "lens": "log"}))
    with pytest.raises(InputError, match=r"config\.json has unknown keys: lens; expected"):
        load(directory)
    del content["normalize"]
    path.write_bytes(seal(content))
    with pytest.raises(InputError, match=r"config\.json lacks keys: normalize; expected"):
        load(directory)
