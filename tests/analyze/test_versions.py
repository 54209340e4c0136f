"""Analyses and events of another version: a minor one only adds, and is read."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from mlsae.analyze import (
    AnalyzeConfig,
    EventsConfig,
    latent_events,
    load,
    load_events,
    run,
    run_events,
    to_delphi,
)
from mlsae.analyze.results.directory import check_replaceable
from mlsae.analyze.results.figures import registry as figures
from mlsae.analyze.results.page.render import render
from mlsae.analyze.results.tables import TABLES_VERSION
from mlsae.analyze.results.text.summary import render as summarize
from mlsae.base.errors import InputError
from mlsae.base.files import read_sealed, seal, sha256_file
from mlsae.cli import main

MAJOR, MINOR = map(int, TABLES_VERSION.split("."))
_ENDS = ("_low", "_high")
LATER, MUCH_LATER = f"{MAJOR}.{MINOR + 1}", f"{MAJOR + 1}.0"


@pytest.fixture(scope="module")
def made(
    world: Any, sae_maker: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("versions") / "analysis"
    sae = sae_maker(world.store, rows="all")
    run(AnalyzeConfig(cache=world.store, sae=sae, out=out, figures=False))
    return out


@pytest.fixture
def analysis(made: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "analysis"))


def _reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = read_sealed(path)
    change(content)
    path.write_bytes(seal(content))


def _command(*words: str) -> str:
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    return done.output


def _files(analysis: Path) -> list[Path]:
    return sorted(analysis.rglob("*.parquet"))


def _to_later(analysis: Path) -> None:
    """Add what a later minor version may: columns at either end, a table, a file, keys."""
    sizes = {}
    for path in _files(analysis):
        table = pq.ParquetFile(path).read()
        text = pa.array(["New"] * len(table), pa.string())
        lists = pa.array([[1.5]] * len(table), pa.list_(pa.float64()))
        table = table.add_column(0, "new_text", text).append_column("new_list", lists)
        table = table.append_column(
            pa.field("new_number", pa.float64(), metadata={"unit": "1", "description": "one half"}),
            pa.array([0.5] * len(table), pa.float64()),
        )
        pq.write_table(table, path)
        sizes["/".join(path.parts[-2:])] = path.stat().st_size
    pq.write_table(pa.table({"latent": [0]}), analysis / "new_table.parquet")

    def change(summary: dict[str, Any]) -> None:
        summary |= {"tables_version": LATER, "new_key": {"a": [1]}}
        summary["commands"]["compare"] = ["mlsae compare"]
        summary["decoder"]["new_words"] = "not a number"
        for part in summary["events"]["parts"]:
            part |= {"num_bytes": sizes[part["path"]], "new_key": 1}

    _reseal(analysis / "summary.json", change)


def test_a_later_minor_version_is_read_and_what_is_new_in_it_kept(
    analysis: Path, made: Path, tmp_path: Path
) -> None:
    before = load(made)
    assert repr(before).startswith(f"Analysis({str(made)!r}: ")
    assert len(repr(before).splitlines()) == 1
    _to_later(analysis)
    found = load(analysis)
    for name in ("layers", "overall", "latents", "latent_layers"):
        table = getattr(found, name)
        assert table.column_names[0] == "new_text"
        assert table["new_number"].to_pylist() == [0.5] * len(table)
        assert table.select(getattr(before, name).column_names).equals(getattr(before, name))
    assert found.examples is not None
    assert "new_list" in found.examples_of(0).column_names
    events = latent_events(found, 1)
    assert len(events) > 0
    assert events["new_text"].unique().to_pylist() == ["New"]
    assert events.select(["row", "layer", "value"]).equals(
        latent_events(before, 1).select(["row", "layer", "value"])
    )
    assert found.summary["new_key"] == {"a": [1]}
    assert found.figures == before.figures
    assert to_delphi(found, tmp_path / "delphi").num_events == before.summary["num_events"]


def test_what_shows_an_analysis_shows_a_later_minor_version(analysis: Path, made: Path) -> None:
    _to_later(analysis)
    found = load(analysis)
    page = render(found)
    assert '<th scope="row" title="one half">new_number</th>' in page
    assert "New" not in page
    assert "not a number" not in page
    assert "mlsae compare" not in page
    assert page.count("<tr>") == render(load(made)).count("<tr>") + 1
    for name in found.figures:
        figures.draw(name, vars(found))
    words = ["latents", str(analysis)]
    listed = _command(*words, "--columns", "latent,new_text,new_number", "--where", "new_number<1")
    assert "0       New         0.5\n" in listed
    assert "New" in _command(*words, "--columns", "new_text", "--sort", "new_text")
    assert "latent 1: active" in _command("examples", str(analysis), "1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--where", "new_text == 1"), "'new_text' holds neither numbers nor true and false"),
        (("--sort", "new_list"), "'new_list' holds lists, which have no order"),
    ],
)
def test_columns_that_cannot_be_compared_are_named(
    analysis: Path, options: tuple[str, ...], message: str
) -> None:
    _to_later(analysis)
    done = CliRunner().invoke(main, ["latents", str(analysis), *options])
    assert done.exit_code != 0
    assert message in str(done.exception) + done.output


def test_columns_that_an_earlier_minor_version_lacks_are_null(analysis: Path) -> None:
    """A version that adds a column does not make those before it unreadable."""
    lost = {
        "layers": "top1_agreement",
        "latents": "unembedding_cosine",
        "examples": "quantile",
    }
    for name, column in lost.items():
        path = analysis / f"{name}.parquet"
        pq.write_table(pq.read_table(path).drop_columns([column]), path)
    found = load(analysis)
    for name, column in lost.items():
        of = getattr(found, name)
        table = of if isinstance(of, pa.Table) else of.to_table()
        assert table[column].null_count == len(table) > 0
        assert table.schema.field(column).metadata[b"description"]
    page = render(found)
    assert "Cosines with the token embedding and the unembedding" not in page
    assert all(figures.draw(name, vars(found)) for name in found.figures)


def test_a_column_that_was_defined_otherwise_has_the_name_of_its_definition(
    analysis: Path, made: Path
) -> None:
    """Before 1.1, zeros were put at eligible tokens alone, and cosines of layers were pooled."""
    names = {
        "ce_zero_eligible": "ce_zero",
        "loss_recovered_zero_eligible": "loss_recovered_zero",
        "adjacent_cosine_pooled": "adjacent_cosine",
    }
    names |= {f"{now}{end}": f"{name}{end}" for now, name in names.items() for end in _ENDS}
    for name in ("layers", "overall"):
        path = analysis / f"{name}.parquet"
        table = pq.read_table(path)
        metadata = table.schema.metadata | {b"mlsae.tables_version": b"1.0"}
        table = table.drop_columns([of for of in names.values() if of in table.column_names])
        table = table.rename_columns([names.get(of, of) for of in table.column_names])
        pq.write_table(table.replace_schema_metadata(metadata), path)
    before, found = load(made), load(analysis)
    for name in ("layers", "overall"):
        now, then = getattr(before, name), getattr(found, name)
        for new, old in names.items():
            if new in now.column_names:
                assert then[new].equals(now[new])
                assert then[old].null_count == len(then)
                assert then.schema.field(old).metadata[b"description"]
    assert all(figures.draw(name, vars(found)) for name in found.figures)
    assert found.layers["adjacent_cosine_pooled"].null_count == 1


@pytest.mark.parametrize(
    ("version", "remedy"),
    [(MUCH_LATER, "read them with a newer mlsae"), ("0.3", "analyze again")],
)
def test_another_major_version_is_refused(analysis: Path, version: str, remedy: str) -> None:
    _reseal(analysis / "summary.json", lambda summary: summary.update(tables_version=version))
    with pytest.raises(InputError) as caught:
        load(analysis)
    assert str(caught.value) == (
        f"{analysis} holds tables of version {version}, this mlsae reads {TABLES_VERSION}: {remedy}"
    )


@pytest.fixture(scope="module")
def written(
    world: Any, sae_maker: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> EventsConfig:
    """A directory of events, finished."""
    out = tmp_path_factory.mktemp("events") / "out"
    config = EventsConfig(cache=world.store, sae=sae_maker(world.store), out=out, part_events=100)
    run_events(config)
    return config


@pytest.fixture
def events(written: EventsConfig, tmp_path: Path) -> EventsConfig:
    """A copy, to be changed."""
    return replace(written, out=Path(shutil.copytree(written.out, tmp_path / "out")))


def _rewrite(directory: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the plan in `name`, and the records that name its hash."""
    _reseal(directory / name, change)
    plan = sha256_file(directory / name)
    for path in (directory / "complete.json", *(directory / "parts").rglob("*.json")):
        _reseal(path, lambda content: content.update(plan=plan))


def test_events_of_a_later_minor_version_are_read(events: EventsConfig) -> None:
    before = load_events(events.out).events.to_table()
    _rewrite(events.out, "events.json", lambda plan: plan.update(tables_version=LATER, new=1))

    def change(content: dict[str, Any]) -> None:
        for part in content["events"]["parts"]:
            part["new"] = 1

    _reseal(events.out / "complete.json", change)
    assert load_events(events.out).events.to_table() == before
    with pytest.raises(InputError, match=r"begun with tables of version .* go on with the mlsae"):
        run_events(events)


def test_events_of_another_major_version_are_refused(events: EventsConfig) -> None:
    _rewrite(events.out, "events.json", lambda plan: plan.update(tables_version=MUCH_LATER))
    with pytest.raises(InputError, match=r"read them with a newer mlsae$"):
        load_events(events.out)


def test_an_analysis_under_its_former_names_is_read(analysis: Path, made: Path) -> None:
    (analysis / "events").rename(analysis / "activations")

    def change(summary: dict[str, Any]) -> None:
        summary |= {"tables_version": "0.4", "activations": summary.pop("events")}

    _reseal(analysis / "summary.json", change)
    before, found = load(made), load(analysis)
    assert found.events.to_table() == before.events.to_table()
    assert latent_events(found, 1) == latent_events(before, 1)
    assert render(found) == render(before).replace(f"tables {TABLES_VERSION}.", "tables 0.4.")
    assert f"events    {analysis / 'activations'} (" in summarize(found)
    check_replaceable(analysis)


def test_events_under_their_former_names_are_read_and_not_continued(events: EventsConfig) -> None:
    before = load_events(events.out).events.to_table()
    (events.out / "events").rename(events.out / "activations")
    (events.out / "events.json").rename(events.out / "activations.json")

    def change(plan: dict[str, Any]) -> None:
        plan |= {"tables_version": "0.4", "kind": "mlsae activations"}

    _rewrite(events.out, "activations.json", change)
    _reseal(events.out / "complete.json", lambda of: of.update(activations=of.pop("events")))
    assert load_events(events.out).events.to_table() == before
    with pytest.raises(InputError, match=r"begun with tables of version 0\.4"):
        run_events(events)
