"""Every `--encoding` from text to a sound store; int8 goes on with the scales it began with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mlsae.base.errors import ResourceError
from mlsae.base.files import read_sealed
from mlsae.base.units import parse_bytes
from mlsae.cli import main
from mlsae.harvest import HarvestConfig, pipeline, run
from mlsae.store import Calibration, PlanMismatchError, Store, open_store
from mlsae.store.format.presets import PRESETS
from mlsae.store.schema import COMPLETE, PLAN, commit_record
from mlsae.store.tools.info import store_info
from mlsae.store.tools.verify import verify

MakeConfig = Callable[..., HarvestConfig]


def harvested(config: HarvestConfig) -> Store:
    assert run(config) is not None
    assert verify(config.out).problems == []
    return open_store(config.out)


def added_fvu(store: Store, shard: int) -> Any:
    return read_sealed(Path(store.place) / commit_record(shard))["added_fvu"]


@pytest.fixture(scope="module")
def exact(model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The values before encoding: the model computes in float32."""
    out = tmp_path_factory.mktemp("exact") / "acts"
    run(
        HarvestConfig(
            model=str(model), dataset=str(dataset), out=out, context_length=16, batch_size=3,
            device="cpu", encoding="float32", max_tokens=700,
        )
    )  # fmt: skip
    return open_store(out)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_store_holds_what_its_preset_names_in_the_bytes_of_the_dry_run(
    name: str, config: MakeConfig, exact: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config(encoding=name, max_tokens=700, dry_run=True))
    line = next(li for li in capsys.readouterr().out.splitlines() if li.startswith(f"{name}: "))
    announced = line.removeprefix(f"{name}: ").split(",")[0]
    assert announced.startswith("at most ") == name.endswith("-zstd")
    size = parse_bytes(announced.removeprefix("at most ").replace(" ", ""))
    store = harvested(config(encoding=name, max_tokens=700))
    taken = sum(file.stat().st_size for file in Path(store.place).rglob("*") if file.is_file())
    assert taken < 1.25 * size
    if not store.is_compressed:
        assert size < 1.25 * taken
    assert store.plan.preset.name == name
    assert (store.encoding, store.is_compressed) == (
        name.removesuffix("-zstd"), name.endswith("-zstd"),
    )  # fmt: skip
    tolerance = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.02}
    for layer in store.layers:
        x, y = exact.read("resid_post", layer), store.read("resid_post", layer)
        np.testing.assert_array_less(
            np.linalg.norm(x - y, axis=1),
            tolerance[store.encoding] * np.linalg.norm(x, axis=1) + 1e-9,
        )


@pytest.mark.parametrize("name", ["int8", "float16", "float32"])
def test_what_the_encoding_costs_is_recorded_for_every_shard(
    name: str, config: MakeConfig, exact: Store
) -> None:
    """All eligible rows are measured for int8, the first batch for a cast, none for float32."""
    store = harvested(config(encoding=name, max_tokens=700))
    eligible = store.eligible(1)
    batch_rows = 3 * 16
    assert store.num_rows > store.shard_rows
    for shard in range(-(-store.num_rows // store.shard_rows)):
        found = added_fvu(store, shard)
        if name == "float32":
            assert found is None
            continue
        start = shard * store.shard_rows
        stop = min(start + (store.shard_rows if name == "int8" else batch_rows), store.num_rows)
        chosen = eligible[start:stop]
        for layer in store.layers:
            x, y = (
                of.read("resid_post", layer, start, stop)[chosen].astype(float)
                for of in (exact, store)
            )
            fvu = ((x - y) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
            measured = found["resid_post"][str(layer)]
            assert measured["num_rows"] == chosen.sum()
            assert measured["total"] == pytest.approx(fvu, rel=1e-5)


def test_int8_of_few_rows_sites_and_positions(
    config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One layer; kept positions; two sites, whose channels have scales of their own."""
    one = harvested(config(out=tmp_path / "one", encoding="int8", layers=(2,), max_tokens=500))
    assert one.layers == (2,)
    kept = harvested(
        config(out=tmp_path / "kept", encoding="int8", keep_positions=5, max_tokens=500)
    )
    calibration = kept.calibration
    assert calibration is not None
    assert calibration.num_rows == kept.eligible(1).sum()
    both = harvested(
        config(
            out=tmp_path / "both", encoding="int8", sites=("resid_post", "mlp_out"), max_tokens=500
        )
    )
    assert both.calibration is not None
    assert list(both.calibration.sites) == ["resid_post", "mlp_out"]
    capsys.readouterr()
    run(config(out=tmp_path / "both", encoding="int8", sites=("mlp_out", "resid_post"),
               max_tokens=500))  # fmt: skip
    line = next(li for li in capsys.readouterr().out.splitlines() if li.startswith("int8 adds"))
    totals = {
        (measured["total"], site, layer)
        for shard in range(-(-both.num_rows // both.shard_rows))
        for site, layers in added_fvu(both, shard).items()
        for layer, measured in layers.items()
    }
    largest, site, layer = max(totals)
    assert line.startswith(
        f"int8 adds an FVU of at most {largest:.2g} to a shard (layer {layer}, {site}), "
    )
    info = store_info(both.place)
    assert info.added_fvu is not None
    assert info.added_fvu.total == largest
    assert f"added FVU   {largest:.2g} at most, in shard" in str(info)


def test_resumed_int8_takes_its_scales_from_the_store(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other hardware would find other last bits, and so another plan."""
    settings = config(encoding="int8", max_tokens=500)
    first = run(settings)
    assert first is not None
    for record in (COMPLETE, commit_record(1)):
        (settings.out / record).unlink()

    def elsewhere(*_: object) -> Calibration:
        raise AssertionError("the store has its scales already")

    monkeypatch.setattr(pipeline, "calibrate", elsewhere)
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    result = run(config(encoding="int8", max_tokens=500, allow_mixed_hardware=True))
    assert result is not None
    assert result.store_id == first.store_id


def test_int8_that_was_killed_before_its_tokens_were_written_reaches_the_same_plan(
    config: MakeConfig,
) -> None:
    settings = config(encoding="int8", max_tokens=500)
    first = run(settings)
    assert first is not None
    for file in settings.out.rglob("*"):
        if file.is_file() and file.name != PLAN:
            file.unlink()
    again = run(settings)
    assert again is not None
    assert again.store_id == first.store_id


def test_another_preset_is_refused(config: MakeConfig) -> None:
    settings = config(encoding="int8", max_tokens=160)
    run(settings)
    for name, text in {
        "int8-zstd": "compression: absent there, {'name': 'zstd', 'level': 3} here",
        "float16": "encoding: int8 there, float16 here",
    }.items():
        with pytest.raises(PlanMismatchError, match=text):
            run(config(encoding=name, max_tokens=160))
    with pytest.raises(PlanMismatchError, match="encoding: int8 there, float16 here"):
        run(config(encoding="auto", max_tokens=160))


def test_encoding_that_costs_too_much_is_refused_in_one_line_and_may_be_allowed(
    config: MakeConfig, tmp_path: Path
) -> None:
    settings = config(encoding="int8", max_tokens=500)
    arguments = [
        "harvest", "--model", settings.model, "--dataset", str(settings.dataset),
        "--out", str(settings.out), "--context-length", "16", "--batch-size", "3", "--device",
        "cpu", "--shard-size", "12000", "--max-tokens", "500", "--encoding", "int8",
    ]  # fmt: skip
    refused = CliRunner().invoke(main, [*arguments, "--max-encoding-fvu", "1e-7"])
    assert refused.exit_code == 1
    (error,) = [line for line in refused.stderr.splitlines() if line.startswith("Error")]
    assert error.startswith("Error: shard 0, layer 0 (resid_post): encoding int8 adds an FVU of ")
    assert error.endswith(
        "over all its rows, more than 1e-07; use another --encoding, or allow it with "
        "--max-encoding-fvu"
    )
    assert refused.stderr.rstrip().endswith(error)
    assert not list(settings.out.rglob("*.partial"))
    assert not list(settings.out.rglob("activations/*/*/c.*"))
    assert [file.name for file in (settings.out / "commits").iterdir()] == ["setup.json"]
    allowed = CliRunner().invoke(main, arguments)
    assert allowed.exit_code == 0
    alone = run(config(encoding="int8", max_tokens=500, out=tmp_path / "alone"))
    assert alone is not None
    assert open_store(settings.out).store_id == alone.store_id


def test_few_rows_are_not_refused_for_a_decile_of_near_twins(config: MakeConfig) -> None:
    """A last shard may be short: two rows that lie close together are no decile."""
    store = harvested(config(encoding="int8", batch_size=1, shard_size=600, max_tokens=160))
    worst = max(
        value
        for shard in range(store.num_rows // store.shard_rows)
        for measured in added_fvu(store, shard)["resid_post"].values()
        for value in measured["by_decile"]
        if value is not None
    )
    assert worst > 1e-3


def test_max_disk_knows_the_bytes_of_the_preset(config: MakeConfig) -> None:
    few = {"shard_size": 100_000, "layers": (0, 1, 2), "max_disk": 700_000}
    with pytest.raises(
        ResourceError, match=r"would take \d+ kB, over --max-disk 700 kB; use --max"
    ):
        run(config(encoding="float16", **few))
    with pytest.raises(
        ResourceError, match=r"take up to \d+ kB, over --max-disk 700 kB; use --max"
    ):
        run(config(encoding="float16-zstd", **few))
    run(config(encoding="int8", dry_run=True, **few))


def test_batch_size_is_found_for_the_bytes_of_the_preset(config: MakeConfig) -> None:
    """A shard of 40,000 bytes holds 78 sequences of 16 rows of 32 bytes."""
    settings = config(batch_size=None, shard_size=40_000, encoding="int8", max_tokens=1600)
    run(settings)
    assert open_store(settings.out).plan.batch_sequences == 64
