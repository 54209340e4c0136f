"""index.html: it holds everything, loads nothing, escapes all text, and stays small."""

import base64
import dataclasses
import json
import re
import shlex
from collections.abc import Callable
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pd
import pyarrow.parquet as pq
import pytest

from mlsae.analyze import Analysis, AnalyzeConfig, load, run
from mlsae.analyze.results.page.examples import AFTER, BEFORE, examples_data
from mlsae.analyze.results.page.latents import MAX_CELLS, choose, latents_data
from mlsae.analyze.results.page.render import MAX_BYTES, render, write_page
from mlsae.base.files import read_sealed, seal

Tables = Callable[[int, int], tuple[pa.Table, pa.Table]]
"""(num_latents, num_layers) → `latents` and `latent_layers`."""

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'\u2028"
VOID = {"meta", "link", "img", "input", "br", "hr"}
EXAMPLES = pa.schema(
    [
        ("latent", pa.int32()),
        ("layer", pa.int32()),
        ("kind", pa.string()),
        ("rank", pa.int32()),
        ("quantile", pa.int32()),
        ("row", pa.int64()),
        ("token", pa.int64()),
        ("token_ids", pa.list_(pa.int32())),
        ("peak", pa.int32()),
        ("pieces", pa.list_(pa.string())),
        ("values", pa.list_(pa.float32())),
        ("layer_values", pa.list_(pa.float32())),
        ("value", pa.float32()),
    ]
)


class Page(HTMLParser):
    """The elements of a page, which must be well-formed; and its text outside of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, str] = {}
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names))
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in {"script", "style"}:
            attributes = self.elements[-1][1]
            self.raw[str(attributes.get("id") or self._open[-1])] = data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @cached_property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.raw["data"])
        return found


def write_examples(
    path: Path,
    latents: list[int],
    layers: list[int],
    *,
    num_top: int = 10,
    piece: str | None = " word",
    length: int = 41,
) -> pd.Dataset:
    """A table to the schema of `examples`, of windows of `length` tokens with the peak at 30."""
    rows = []
    kinds = [("top", rank, None) for rank in range(num_top)]
    kinds += [("sample", rank, part) for part in range(3) for rank in range(2)]
    kinds += [("top_layer", rank, None) for rank in range(2)]
    for kind, rank, part in kinds:
        for layer in layers if kind == "top_layer" else layers[:1]:
            values = np.zeros(length, np.float32)
            values[[28, 30]] = 0.5, 10.0 - rank
            texts = [f"{piece}{n % 7}" if n != 30 else "peak" for n in range(length)]
            rows.append(
                {
                    "latent": 0,
                    "layer": layer,
                    "kind": kind,
                    "rank": rank,
                    "quantile": part,
                    "row": 30 + rank,
                    "token": 30 + rank + 100 * (kind == "sample"),
                    "token_ids": list(range(length)),
                    "peak": 30,
                    "pieces": None if piece is None else texts,
                    "values": [None, *values[1:].tolist()],
                    "layer_values": [10.0 - rank, *[0.0] * (len(layers) - 1)],
                    "value": 10.0 - rank,
                }
            )
    one = pa.Table.from_pylist(rows, schema=EXAMPLES)
    table = one.take(pa.array(np.tile(np.arange(len(one)), len(latents))))
    ids = pa.array(np.repeat(latents, len(one)), pa.int32())
    pq.write_table(table.set_column(0, "latent", ids), path / "examples.parquet")
    return pd.dataset(path / "examples.parquet", format="parquet")


@pytest.fixture(scope="module")
def analysis(drawn: Any) -> Analysis:
    """The analysis with every figure."""
    found: Analysis = drawn.analysis
    return found


def page_of(analysis: Analysis) -> Page:
    return Page(render(analysis))


def changed(analysis: Analysis, **summary: Any) -> Analysis:
    return dataclasses.replace(analysis, summary={**analysis.summary, **summary})


def test_the_page_that_is_written_is_the_page_of_the_analysis(
    analysis: Analysis, tmp_path: Path
) -> None:
    """Made again from what lies on the disk, it has the same bytes."""
    made = analysis.page.read_bytes()
    write_page(load(analysis.path), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == made
    assert len(made) < MAX_BYTES


def test_nothing_outside_of_the_page_is_asked_for(analysis: Analysis) -> None:
    """No address but data: and places on the page; one style and one script, named by hash."""
    page = page_of(analysis)
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name in {"src", "href", "srcset", "action", "data", "poster", "cite"}:
                assert str(value).startswith(("#", "data:image/png;base64,", "data:,")), (tag, name)
            assert name != "style"
            assert not name.startswith("on")
    assert "@import" not in page.raw["style"]
    assert "url(" not in page.raw["style"]
    for word in ("fetch(", "XMLHttpRequest", "import(", "innerHTML", "eval(", "http"):
        assert word not in page.raw["script"].replace("http://www.w3.org/2000/svg", "")
    tags = [tag for tag, _ in page.elements]
    assert (tags.count("style"), tags.count("script")) == (1, 2)
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv")]
    assert str(policy).startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in str(policy)


def test_every_id_that_is_pointed_at_is_there_once(analysis: Analysis) -> None:
    page = page_of(analysis)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name in ("aria-labelledby", "href"):
            target = attributes.get(name)
            if target is not None and not target.startswith("data:"):
                assert target.removeprefix("#") in ids
    for tag, attributes in page.elements:
        if tag == "img":
            assert attributes["alt"]


def test_the_main_numbers_have_intervals(
    world: Any, sae_maker: Callable[..., Path], analysis: Analysis, tmp_path: Path
) -> None:
    """Where sequences are enough for one."""
    config = AnalyzeConfig(
        cache=world.store,
        sae=sae_maker(world.store),
        out=tmp_path / "out",
        rows="train",
        examples=0,
        figures=False,
    )
    found = run(config)
    text, mean = page_of(found).text, found.overall.to_pylist()[0]
    for name in ("fvu", "delta_ce", "l0"):
        low, high = mean[f"{name}_low"], mean[f"{name}_high"]
        assert f"{low:.4g} to {high:.4g}".replace("-", "−") in text
    assert "its 95% interval for other text of the kind, from 30 sequences." in text
    assert "No intervals: 7 sequences, and they begin at 10." in page_of(analysis).text


def test_numbers_and_tables_are_those_of_the_analysis(analysis: Analysis) -> None:
    page = page_of(analysis)
    mean, together = analysis.overall.to_pylist()
    for name in ("fvu", "delta_ce", "l0"):
        assert mean[f"{name}_low"] is mean[f"{name}_high"] is None
        assert f"{mean[name]:.4g}".replace("-", "−") in page.text
    assert f"spliced at once: {together['delta_ce']:.4g}".replace("-", "−") in page.text
    assert (mean["loss_recovered_mean"] is None) == ("undefined" in page.text)
    total = analysis.summary["overall"]
    assert f"{total['dead_fraction']:.2%}" in page.text
    assert f"{total['mean_layer_std']:.4g}" in page.text
    for row in analysis.layers.to_pylist():
        for name in ("fvu", "mse", "l0", "ce_sae", "norm"):
            assert f"{row[name]:.4g}" in page.text
    for name in analysis.layers.column_names:
        if name != "layer" and not name.endswith(("_low", "_high")):
            measured = analysis.layers[name].null_count < len(analysis.layers)
            assert bool(re.search(rf"\b{name}\b", page.text)) == measured, name
    share = analysis.summary["layer_variance"]["mass"]["single_over_aggregate"]
    assert f"At a single token, {share:.0%} of the variance is there" in page.text
    images = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    pictures = [name for name in analysis.summary["figures"] if name.endswith(".png")]
    files = [(analysis.path / name).read_bytes() for name in pictures]
    assert sorted(images) == sorted(
        f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in files
    )


def test_the_latents_are_those_of_the_tables(analysis: Analysis) -> None:
    data = page_of(analysis).data
    assert data["latents"] == list(range(48))
    assert data["layers"] == [0, 1, 3]
    for row in analysis.latents.to_pylist():
        for name, values in data["columns"].items():
            assert values[row["latent"]] == (
                None if row[name] is None else pytest.approx(row[name], rel=1e-3)
            )
    probs = [p or 0 for p in analysis.latent_layers["prob"].to_pylist()]
    np.testing.assert_allclose(np.array(data["profile"]) / 1000, probs, atol=5e-4)
    assert data["counts"] == analysis.latent_layers["count"].to_pylist()
    assert data["about"]["density"].startswith("count / (rows evaluated, over all layers)")


def test_what_is_missing_is_said_with_its_reason(
    world: Any, sae_maker: Callable[..., Path], analysis: Analysis, tmp_path: Path
) -> None:
    gone = world.model.with_name("gone")
    world.model.rename(gone)
    try:
        config = AnalyzeConfig(
            cache=world.store,
            sae=sae_maker(world.store),
            out=tmp_path / "out",
            rows="all",
            examples=0,
            figures=False,
        )
        text = page_of(run(config)).text
    finally:
        gone.rename(world.model)
    assert (
        "Cross-entropy, delta CE, loss recovered, KL and top-1 agreement were not measured: there "
        f"is no model directory {world.model}" in text
    )
    assert "Cosines with the token embedding and the unembedding are missing" in text
    assert "delta_ce" not in text
    assert text.count("not measured") >= 3
    assert "Examples of latents: this analysis has no table of them." in text
    whole = page_of(analysis).text
    assert "were not measured" not in whole
    assert "<h3>Notes</h3>" not in render(analysis)


def test_provenance_names_everything_and_how_to_make_it(analysis: Analysis, world: Any) -> None:
    text, summary = page_of(analysis).text, analysis.summary
    for key in ("store_id", "plan_id", "sae_sha256", "model_fingerprint", "site", "sae"):
        assert summary[key] in text
    assert str(world.model) in text
    assert str(world.store) in text
    assert f"torch {summary['versions']['torch']}" in text
    assert "harvest: no command, since " in text
    words = f"mlsae analyze --cache {world.store} --sae {summary['sae']} --out analysis"
    assert words in text.replace("\\ ", "")


def test_text_from_elsewhere_is_only_text(analysis: Analysis, tmp_path: Path) -> None:
    """In paths, names, notes, reasons, prompts' figures and token text; a page of as many tags."""
    places = dict.fromkeys(("sae", "site", "no_cross_entropy_because"), HOSTILE)
    figure = analysis.path / analysis.summary["figures"][0]
    copy = tmp_path / "prompt_<script>alert(3)<b>.png"
    copy.write_bytes(figure.read_bytes())
    hostile = dataclasses.replace(
        changed(
            analysis,
            **places,
            cache=[HOSTILE],
            notes=[HOSTILE],
            cross_entropy=None,
            model={"name": HOSTILE, "revision": HOSTILE, "init": HOSTILE, "init_seed": 0},
            text=[{"name": HOSTILE}],
            commands={"harvest": [shlex.join(["a", "--b", HOSTILE])], "train": HOSTILE},
            figures=[copy.name],
        ),
        path=tmp_path,
    )
    examples = write_examples(tmp_path, list(range(48)), [0, 1, 3], piece=HOSTILE)
    page = page_of(dataclasses.replace(hostile, examples=examples))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2
    assert tags.count("b") == 0
    assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "prompt_<script>alert(3)<b>.png" in page.text
    assert page.text.count("alert(1)") >= 10
    assert {piece[:-1] for piece in page.data["pieces"] if "peak" not in piece} == {HOSTILE}
    assert set("<>&\u2028") & set(page.raw["data"]) == set()


def test_a_path_that_is_no_utf_8_does_not_stop_it(analysis: Analysis, tmp_path: Path) -> None:
    """Linux allows any bytes in a name."""
    odd = changed(analysis, sae=b"sae-\xff".decode("utf-8", "surrogateescape"))
    write_page(odd, tmp_path / "page.html")
    assert "sae-?" in (tmp_path / "page.html").read_text("utf-8")


def test_examples_keep_window_peak_and_values(tmp_path: Path) -> None:
    """Examples of other latents, and of lower ranks, are left out."""
    found = write_examples(tmp_path, [5, 7, 9], [0, 1, 3])
    data = examples_data(found, np.array([5, 9]), 10**6)
    assert data["complete"]
    assert {example[0] for example in data["examples"]} == {5, 9}
    mine = [example for example in data["examples"] if example[0] == 9]
    assert [example[5] for example in mine if example[1] == 0] == [10, 9, 8, 7, 6, 5, 4, 3]
    assert [example[2] for example in mine if example[1] == 1] == [0, 1, 2]
    # At layer 0 it is the one that is the largest over all layers.
    assert [example[3] for example in mine if example[1] == 2] == [1, 3]
    _, _, _, layer, token, value, peak, pieces, active, by_layer = mine[0]
    texts = [data["pieces"][piece] for piece in pieces]
    assert (layer, token, value, peak) == (0, 30, 10.0, BEFORE)
    assert len(texts) == BEFORE + 1 + AFTER
    assert texts[peak] == "peak"
    assert texts[0] == " word6"
    assert active == [BEFORE - 2, 5, BEFORE, 100]
    assert by_layer == [100, 0, 0]


def test_without_a_tokenizer_token_ids_are_shown(tmp_path: Path) -> None:
    found = write_examples(tmp_path, [0], [0], piece=None)
    data = examples_data(found, np.array([0]), 10**6)
    assert all(re.fullmatch(r"⟨\d+⟩", piece) for piece in data["pieces"])


def test_where_examples_do_not_fit_each_latent_keeps_as_many(tmp_path: Path) -> None:
    """The largest first."""
    found = write_examples(tmp_path, list(range(40)), [0, 1])
    whole = examples_data(found, np.arange(40), 10**7)
    most = len(json.dumps(whole, separators=(",", ":"))) // 3
    some = examples_data(found, np.arange(40), most)
    assert not some["complete"]
    assert 0.9 * most < len(json.dumps(some, separators=(",", ":"))) < most + 500
    numbers = np.bincount([example[0] for example in some["examples"]], minlength=40)
    assert set(numbers.tolist()) <= {numbers.min(), numbers.min() + 1}
    assert min(numbers) >= 3
    kept = {(example[0], example[5]) for example in some["examples"] if example[1] == 0}
    assert {(latent, value) for latent in range(40) for value in (10, 9, 8)} <= kept


@pytest.mark.parametrize(("num_latents", "num_layers"), [(131_072, 6), (8_192, 96)])
def test_a_page_of_131072_latents_is_small(
    analysis: Analysis, random_tables: Tables, tmp_path: Path, num_latents: int, num_layers: int
) -> None:
    """With examples for all that are shown, and figures that are too large to be shown all."""
    latents, latent_layers = random_tables(num_latents, num_layers)
    chosen, _ = choose(latents, num_layers)
    examples = write_examples(tmp_path, chosen.tolist(), list(range(num_layers))[:2], num_top=4)
    figures = [*analysis.summary["figures"], "huge.png"]
    for name in figures[:-1]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((analysis.path / name).read_bytes())
    (tmp_path / "huge.png").write_bytes(bytes(2_000_000))
    large = dataclasses.replace(
        changed(analysis, figures=figures),
        path=tmp_path,
        examples=examples,
        latents=latents,
        latent_layers=latent_layers,
    )
    text = render(large)
    assert 1_000_000 < len(text.encode()) < MAX_BYTES
    page = Page(text)
    assert len(page.data["latents"]) == len(chosen)
    assert "Figures left out to keep this page small: huge.png" in page.text
    assert len(page.data["profile"]) == len(chosen) * num_layers <= MAX_CELLS


def test_a_dead_sae_has_a_page(analysis: Analysis, random_tables: Tables) -> None:
    """No variance of layers, no living latent, nulls throughout."""
    latents, latent_layers = random_tables(10, 3)
    nulls = {name: pa.nulls(10, pa.float64()) for name in ("layer_std", "layer_mean", "mean")}
    for name, column in {**nulls, "count": pa.array([0] * 10)}.items():
        latents = latents.set_column(latents.schema.get_field_index(name), name, column)
    dead = dataclasses.replace(
        changed(
            analysis,
            layer_variance=None,
            overall={**analysis.summary["overall"], "mean_layer_std": None, "num_dead": 10},
        ),
        latents=latents,
        latent_layers=latent_layers,
    )
    page = page_of(dead)
    assert page.data["columns"]["layer_std"] == [None] * 10
    assert "Variance of the layer" not in page.text


def test_numbers_are_short_and_nulls_stay(analysis: Analysis) -> None:
    data = latents_data(analysis.latents, analysis.latent_layers, np.array([3, 40]))
    assert data["latents"] == [3, 40]
    for values in data["columns"].values():
        for value in values:
            if isinstance(value, float):
                assert value == float(f"{value:.4g}")


def test_the_summary_stays_sealed(analysis: Analysis) -> None:
    """The file holds what the page reads of the summary."""
    summary = read_sealed(analysis.path / "summary.json")
    assert summary == analysis.summary
    assert seal(summary) == (analysis.path / "summary.json").read_bytes()
    assert summary["model"]["name"]
    assert summary["sae_config"] == {
        "architecture": "topk",
        "d_in": 16,
        "encoder_bias": False,
        "eps": 1e-05,
        "k": 4,
        "layer_scale": "none",
        "normalize": "standardize",
        "num_latents": 48,
    }


def test_prompts_have_a_section_of_their_own(analysis: Analysis, tmp_path: Path) -> None:
    """With their text; every figure as large as its file says, at 96 pixels to the inch."""
    names = ["prompt_0.png", "density.png"]
    for name in names:
        (tmp_path / name).write_bytes((analysis.path / "figures/density.png").read_bytes())
    page = page_of(
        dataclasses.replace(
            changed(analysis, figures=names, prompts=["Mary had <b>"]), path=tmp_path
        )
    )
    heads = [a["id"] for tag, a in page.elements if tag == "h2"]
    assert heads == ["numbers", "figures", "prompts", "layers", "latents", "provenance"]
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert [image["alt"] for image in images] == ["Densities of latents", "“Mary had <b>”"]
    width, height = (
        str(round(96 * inches)) for inches in analysis.figure("density").get_size_inches()
    )
    assert {(image["width"], image["height"]) for image in images} == {(width, height)}


def test_an_analysis_without_figures_says_so(analysis: Analysis) -> None:
    assert "None were drawn." in page_of(changed(analysis, figures=[])).text
