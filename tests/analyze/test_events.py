"""`mlsae events`: what it writes, what it says, what it notices."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as pd
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from mlsae.analyze import (
    AnalyzeConfig,
    Events,
    EventsConfig,
    latent_events,
    load_events,
    run,
    run_events,
)
from mlsae.base.errors import InputError
from mlsae.base.files import read_sealed, seal
from mlsae.cli import main
from mlsae.sae import SAE, ReLU, SAEConfig, load
from mlsae.store import Store, create, open_store

LAYERS, LENGTH, NUM_SEQUENCES = (0, 1, 3), 24, 37
SMALL = 700
"""Events of a part: seven sequences of four latents a row, and a last one of two."""

Key = tuple[int, int, int, int]


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def relu_sae(directory: Path, store: Store, record: dict[str, Any]) -> Path:
    """Random weights; a row uses about half of the latents."""
    sae = SAE(SAEConfig(d_in=store.d_model, num_latents=40, architecture=ReLU()))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
    sae.save(directory, record)
    return directory


def relu_latents(sae: SAE, x: np.ndarray) -> np.ndarray:
    """By definition, dense, in float64."""
    weights = {name: p.detach().double().numpy() for name, p in sae.named_parameters()}
    u = (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-5)
    return np.maximum((u - weights["b"]) @ weights["W_enc"].T + weights.get("b_enc", 0), 0)


@pytest.fixture(scope="module")
def written(
    world: Any, sae_maker: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> EventsConfig:
    """A finished directory; not to be changed."""
    config = EventsConfig(
        cache=world.store,
        sae=sae_maker(world.store),
        out=tmp_path_factory.mktemp("written") / "events",
        rows="all",
        part_events=SMALL,
        batch_size=50,
        device="cpu",
    )
    run_events(config)
    return config


@pytest.fixture
def copied(written: EventsConfig, tmp_path: Path) -> EventsConfig:
    """A copy of it, to be damaged."""
    out = tmp_path / "events"
    shutil.copytree(written.out, out)
    return changed(written, out=out)


def changed(config: EventsConfig, **changes: Any) -> EventsConfig:
    return EventsConfig(**vars(config) | changes)


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_the_events_are_every_active_latent_of_every_eligible_row(
    kind: str, world: Any, written: EventsConfig, dense: Any, tmp_path: Path
) -> None:
    """Against the dense SAE in float64; nothing else is there, and nothing twice."""
    config = written
    if kind == "relu":
        record = load(written.sae).training_record
        config = changed(
            written,
            sae=relu_sae(tmp_path / "sae", open_store(world.store), record),
            out=tmp_path / "events",
            part_events=3000,
        )
        run_events(config)
    sae = load(config.sae)
    found = load_events(config.out).events.to_table().to_pydict()
    keys = list(zip(found["layer"], found["row"], found["token"], found["latent"], strict=True))
    values = dict(zip(keys, found["value"], strict=True))
    assert len(values) == len(keys)
    expected: dict[Key, float] = {}
    eligible = (world.flags == 0) & (np.arange(len(world.flags)) % LENGTH >= 1)
    for layer in LAYERS:
        x = world.activations[layer].astype(np.float64)
        z = relu_latents(sae, x) if kind == "relu" else dense(sae).latents(x)
        z[~eligible] = 0
        for row, latent in np.argwhere(z > 0).tolist():
            expected[layer, row, row, latent] = z[row, latent]
    # A latent whose pre-activation is 0 but for rounding may be on either side.
    unsure = {key for key in values.keys() ^ expected.keys() if expected.get(key, 0) < 1e-5}
    assert values.keys() - unsure == expected.keys() - unsure
    assert len(unsure) <= 2
    for key in expected.keys() - unsure:
        assert values[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5)


def test_parts_are_bounded_and_sorted_and_every_reader_sees_the_layer(
    written: EventsConfig,
) -> None:
    found = load_events(written.out)
    parts = found.summary["events"]["parts"]
    assert len(parts) == 18
    folder = written.out / "events"
    assert sorted(part["path"] for part in parts) == sorted(
        str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()
    )
    for part in parts:
        layer, first_row = map(int, re.findall(r"\d+", part["path"]))
        table = pq.ParquetFile(folder / part["path"]).read()
        assert 0 < len(table) == part["num_events"] <= SMALL
        assert set(table["layer"].to_pylist()) == {layer}
        rows, latents = table["row"].to_numpy(), table["latent"].to_numpy()
        assert first_row <= rows.min() < rows.max() < first_row + 7 * LENGTH
        order = np.lexsort((rows, latents))
        np.testing.assert_array_equal(order, np.arange(len(order)))
    everything = found.events.to_table()
    assert everything.schema.names == ["row", "token", "layer", "latent", "value"]
    discovered = pd.dataset(folder, partitioning="hive")
    assert len(discovered.get_fragments(filter=pc.field("layer") == 3).__next__().path) > 0
    of_one = discovered.to_table(filter=pc.field("layer") == 3)
    assert of_one.schema.field("layer").type == everything.schema.field("layer").type
    assert len(of_one) == pc.sum(pc.equal(everything["layer"], 3)).as_py()


def test_an_analysis_writes_the_same_parts(
    world: Any, written: EventsConfig, tmp_path: Path
) -> None:
    """Byte for byte: two doors, one code path."""
    settings: dict[str, Any] = {"cache": world.store, "sae": written.sae, "rows": "all"}
    found = run(AnalyzeConfig(**settings, out=tmp_path / "analysis", batch_size=50, figures=False))
    run_events(EventsConfig(**settings, out=tmp_path / "events", batch_size=50))
    ours = contents(tmp_path / "analysis" / "events")
    assert ours == contents(tmp_path / "events" / "events")
    assert len(ours) == 3
    both = found.summary["events"], load_events(tmp_path / "events").summary
    total = sum(map(len, ours.values()))
    assert both[0]["num_bytes"] == both[1]["events"]["num_bytes"] == total
    events = latent_events(found, 5)
    assert events.equals(latent_events(load_events(tmp_path / "events"), 5))
    assert len(events) > 0


def test_it_says_what_was_written_and_a_rerun_that_it_was(
    written: EventsConfig, copied: EventsConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in copied.out.rglob("*")}
    run_events(copied)
    totals = load_events(copied.out).summary["events"]
    each = totals["num_bytes"] / totals["num_events"]
    line = (
        f"events {copied.out}: {totals['num_events']:,} events in 18 parts, "
        f"{totals['num_bytes'] / 1000:.3g} kB, {each:.2f} bytes an event"
    )
    assert capsys.readouterr().out.splitlines() == [
        f"{copied.out} is finished and every byte of it sound: nothing to do",
        line,
    ]
    assert {file: file.stat().st_mtime_ns for file in copied.out.rglob("*")} == before
    assert contents(copied.out) == contents(written.out)


def command(config: EventsConfig) -> list[str]:
    """The command line of a configuration."""
    return [
        "events", "--cache", str(config.cache), "--sae", str(config.sae),
        "--out", str(config.out), "--rows", config.rows, "--batch-size", str(config.batch_size),
        "--part-events", str(config.part_events), "--device", "cpu",
    ]  # fmt: skip


def refused(arguments: Sequence[str]) -> str:
    """The one line of a command that is refused."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "Traceback" not in result.stderr
    return line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": "train"}, "rows is all there, train here; num_parts is 18 there, 15 here; num_"),
        ({"batch_size": 51}, "batch_size is 50 there, 51 here; give those again, or another dir"),
        ({"part_events": 90}, "part_events is 700 there, 90 here; num_parts is 18 there, 111 here"),
        ({"sae": "OTHER"}, "sae_sha256 is "),
    ],
)
def test_other_settings_are_refused_and_named(
    copied: EventsConfig,
    world: Any,
    sae_maker: Callable[..., Path],
    changes: dict[str, Any],
    message: str,
) -> None:
    if "sae" in changes:
        changes = {"sae": sae_maker(world.store, seed=1)}
    before = contents(copied.out)
    line = refused(command(changed(copied, **changes)))
    assert f"--out {copied.out} was begun with other settings: {message}" in line
    assert contents(copied.out) == before


def test_inputs_that_were_moved_are_the_same(
    copied: EventsConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(str(copied.cache), tmp_path / "moved")
    run_events(changed(copied, cache=tmp_path / "moved"))
    assert "nothing to do" in capsys.readouterr().out


PART = "layer-1/part-000000000168.parquet"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, r"is damaged: its SHA-256 is [0-9a-f]{12}…, expected [0-9a-f]{12}…"),
        (cut, r"is damaged: it has \d+ bytes, expected \d+"),
    ],
)
@pytest.mark.parametrize("is_complete", [True, False])
def test_a_damaged_part_is_named_and_made_again_once_it_is_removed(
    damage: Callable[[Path], None],
    message: str,
    is_complete: bool,
    written: EventsConfig,
    copied: EventsConfig,
) -> None:
    part = copied.out / "events" / PART
    damage(part)
    if not is_complete:
        (copied.out / "complete.json").unlink()
        (copied.out / "parts/layer-3/part-000000000000.json").unlink()
    remedy = "remove it if it is there and run the same command again"
    assert re.fullmatch(rf"Error: {part} {message}; {remedy}", refused(command(copied)))
    part.unlink()
    result = CliRunner().invoke(main, command(copied))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"going on: {17 if is_complete else 16} of 18 parts are there")
    assert contents(copied.out) == contents(written.out)


def read_all(found: Events) -> None:
    for latent in range(48):
        latent_events(found, latent)


def test_readers_name_what_is_damaged(copied: EventsConfig) -> None:
    """A flipped byte when it is read, by the checksum of its page; a size at once."""
    part = copied.out / "events" / PART
    found = load_events(copied.out)
    flip(part)
    with pytest.raises(InputError, match=f"{PART} is damaged: its SHA-256"):
        read_all(found)
    cut(part)
    with pytest.raises(InputError, match=rf"{PART} is damaged: it has \d+ bytes, expected"):
        load_events(copied.out)
    part.unlink()
    with pytest.raises(InputError, match=f"{PART} is missing; "):
        load_events(copied.out)


def test_what_is_no_part_is_named(copied: EventsConfig) -> None:
    folder = copied.out / "events"
    foreign = folder / "layer-1" / "part-000000000024.parquet"
    shutil.copy(folder / PART, foreign)
    assert f"Error: {foreign} does not belong to the events in {copied.out}: move it away" in (
        refused(command(copied))
    )
    foreign.unlink()
    record = copied.out / "parts" / "layer-1" / "part-000000000168.json"
    content = read_sealed(record)
    record.write_bytes(seal(content | {"plan": "0" * 64}))
    assert f"Error: {record} records a part of other events; remove it" in (
        refused(command(copied))
    )
    record.write_bytes(record.read_bytes().replace(b"num_bytes", b"num_bites"))
    assert f"Error: {record} is damaged: its content does not match" in refused(command(copied))


def test_a_directory_that_cannot_be_used_is_left_alone(
    written: EventsConfig, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    line = refused(command(changed(written, out=tmp_path / "mine")))
    assert line.endswith(
        "holds other things than events (thesis.tex); give a directory that is empty or absent"
    )
    assert list(contents(tmp_path)) == ["mine/thesis.tex"]
    with pytest.raises(InputError, match=r"holds no events: it has no events.json; make"):
        load_events(tmp_path / "mine")


def test_what_a_kill_at_the_very_beginning_leaves_is_cleared_away(
    written: EventsConfig, tmp_path: Path
) -> None:
    """The temporary file of the first record, of a process that is gone."""
    out = tmp_path / "events"
    out.mkdir()
    script = (
        "import sys; from pathlib import Path; from mlsae.base.files import partial_path\n"
        "partial_path(Path(sys.argv[1])).touch()"
    )
    subprocess.run([sys.executable, "-c", script, str(out / "events.json")], check=True)
    assert len(contents(out)) == 1
    run_events(changed(written, out=out))
    assert contents(out) == contents(written.out)


def test_what_is_unfinished_is_not_read(copied: EventsConfig) -> None:
    (copied.out / "complete.json").unlink()
    (copied.out / "parts" / PART).with_suffix(".json").unlink()
    with pytest.raises(InputError, match=r"is unfinished: 17 of 18 parts are there; run the same"):
        load_events(copied.out)


@pytest.mark.parametrize(
    ("latent", "layers", "message"),
    [
        (48, None, "there is no latent 48: the SAE of .* has latents 0 to 47"),
        (-1, None, "there is no latent -1"),
        (3, [0, 2], "there is no layer 2 in .*; it has 0, 1, 3"),
    ],
)
def test_latents_and_layers_out_of_range_are_refused(
    written: EventsConfig, latent: int, layers: list[int] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        latent_events(load_events(written.out), latent, layers=layers)


def test_the_events_of_a_latent_are_all_of_its_and_no_others(written: EventsConfig) -> None:
    found = load_events(written.out)
    everything = found.events.to_table().to_pylist()
    for latent in range(48):
        for layers in (None, [3, 1]):
            expected = [
                event
                for event in everything
                if event["latent"] == latent and event["layer"] in (layers or LAYERS)
            ]
            expected.sort(key=lambda event: (event["layer"], event["row"]))
            assert latent_events(found, latent, layers=layers).to_pylist() == expected


def bytes_read() -> int:
    """By this process, as the system counts it."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux to count the bytes that are read")
def test_a_latent_is_read_in_under_a_twentieth_of_the_bytes_of_all(
    tmp_path: Path, sae_maker: Callable[..., Path]
) -> None:
    """Two million events in one part, counted by the system from opening the directory on."""
    length, num_sequences, width = 1024, 64, 8
    generator = np.random.default_rng(0)
    with create(
        tmp_path / "acts",
        tokens=np.arange(length * num_sequences) % 100,
        context_length=length,
        layers=(0,),
        d_model=width,
    ) as writer:
        for _ in range(num_sequences):
            rows = generator.normal(size=(length, width)).astype(np.float32)
            writer.append({("resid_post", 0): rows})
    config = EventsConfig(
        cache=tmp_path / "acts",
        sae=sae_maker(tmp_path / "acts", k=32, num_latents=1024),
        out=tmp_path / "events",
        rows="all",
    )
    run_events(config)
    before = bytes_read()
    batches = load_events(config.out).events.to_batches()
    counts = np.sum([np.bincount(b["latent"], minlength=1024) for b in batches], axis=0)
    full = bytes_read() - before
    assert counts.sum() > 2_000_000
    latents = np.argsort(counts, kind="stable")
    for latent in (int(latents[512]), int(latents[-1])):
        before = bytes_read()
        events = latent_events(load_events(config.out), latent)
        assert 0 < 20 * (bytes_read() - before) < full
        assert len(events) == counts[latent]


def test_a_disk_that_cannot_hold_the_events_is_refused_first(
    written: EventsConfig, tmp_path: Path
) -> None:
    """A real file system of 64 kB; what is needed is said, and nothing is begun."""
    if shutil.which("unshare") is None:
        pytest.skip("needs the unshare command to mount a small file system")
    mount = f"mount -t tmpfs -o size=64k tmpfs '{tmp_path}' && \"$@\"; ls '{tmp_path}'"
    unshare = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    arguments = command(changed(written, out=tmp_path / "events"))
    done = subprocess.run(
        [*unshare, sys.executable, "-m", "mlsae", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    # At most 37 · 24 rows of 4 latents at 3 layers, 9 bytes each.
    assert re.fullmatch(
        r"Error: not enough disk for the events at .*/events: needs 95\.9 kB, 6\d\.\d kB free; "
        r"lower --max-tokens or choose another --out\n",
        done.stderr,
    )
    assert done.stdout == ""
