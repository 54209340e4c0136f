"""index.html in a real headless Chromium."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mlsae.analyze import Analysis, AnalyzeConfig, load, run
from mlsae.analyze.results.page.render import write_page
from mlsae.analyze.results.page.tables import number
from mlsae.sae import SAE, SAEConfig, TopK
from mlsae.store import open_store

pytestmark = [
    pytest.mark.external,
    pytest.mark.timeout(3000),  # Environments may have to be installed.
]

NUM_LATENTS = 120
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def chromium() -> tuple[str, str]:
    """The browser and its driver."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium chromium-driver)")
    return browser, driver


@pytest.fixture
def analysis(sample_maker: Callable[..., Any], tmp_path: Path) -> Analysis:
    """Analysis of an untrained SAE; its folder's name and its examples are markup."""
    folder = tmp_path / "<img src=x onerror=alert(3)>"
    store = open_store(sample_maker().path)
    sae = SAE(
        SAEConfig(d_in=20, num_latents=NUM_LATENTS, architecture=TopK(4)),
        torch.Generator().manual_seed(0),
    )
    record = {
        "store_id": "d" * 64,
        "stores": [{"store_id": "d" * 64, "tokens_sha256": "e" * 64}],
        "model_fingerprint": None,
        "site": "resid_post",
        "layers": [0, 1, 3],
        "skip_positions": 1,
        "validation": {"fraction": 0.2, "seed": 3},
    }
    sae.save(folder / "sae", record)
    found = run(
        AnalyzeConfig(cache=store.place, sae=folder / "sae", out=folder / "out", rows="all")
    )
    _write_examples(found.path)
    found = load(found.path)
    write_page(found, found.page)
    return found


def _write_examples(directory: Path) -> None:
    """Instead of what is there: two of the largest values of each latent, and one drawn."""
    rows = []
    for latent in range(NUM_LATENTS):
        for kind, rank, quantile in (("top", 0, None), ("top", 1, None), ("sample", 0, 2)):
            values = np.zeros(12, np.float32)
            values[[5, 8]] = 2.0, 4.0 - rank
            pieces = [
                " some",
                "\n",
                HOSTILE,
                " of",
                " the",
                " text",
                " 名",
                "前",
                f" peak{latent} ",
            ]
            rows.append(
                {
                    "latent": latent,
                    "layer": 1,
                    "kind": kind,
                    "rank": rank,
                    "quantile": quantile,
                    "token": 24 * 3 + 8,
                    "token_ids": list(range(12)),
                    "peak": 8,
                    "pieces": [*pieces, " and", " so", " on"],
                    "values": values.tolist(),
                    "layer_values": [0.0, 4.0, 2.0],
                    "value": 4.0 - rank,
                }
            )
    small = pa.int32()
    schema = pa.schema(
        [
            *((name, small) for name in ("latent", "layer", "rank", "quantile", "peak")),
            ("kind", pa.string()),
            ("token", pa.int64()),
            ("token_ids", pa.list_(small)),
            ("pieces", pa.list_(pa.string())),
            ("values", pa.list_(pa.float32())),
            ("layer_values", pa.list_(pa.float32())),
            ("value", pa.float32()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), directory / "examples.parquet")


def test_the_page_in_chromium(
    analysis: Analysis,
    chromium: tuple[str, str],
    peer: Callable[..., str],
    tmp_path: Path,
) -> None:
    """The page opens from the disk, sorts, filters, opens latents, fits wide and narrow windows."""
    shots = tmp_path / "shots"
    shots.mkdir()
    seen = json.loads(peer("selenium", analysis.page, *chromium, shots))
    # Nothing failed, nothing was asked of anybody, and no text was taken for markup.
    assert seen["console"] == []
    assert [url for url in seen["requests"] if not url.startswith("data:")] == [
        analysis.page.as_uri()
    ]
    assert seen["alert"] is None
    assert all(seen["images"])
    assert len(seen["images"]) == len(
        [name for name in analysis.summary["figures"] if name.endswith(".png")]
    )

    latents = analysis.latents.to_pylist()
    alive = [row for row in latents if not row["dead"]]

    def order(name: str, sign: int) -> list[str]:
        known = sorted(alive, key=lambda row: (sign * row[name], row["latent"]))
        dead = [row for row in latents if row["dead"]]
        return [str(row["latent"]) for row in (*known, *dead)]

    # To four digits, ties are by index: it is the numbers shown that are sorted.
    for row in alive:
        for name in ("density", "layer_std"):
            row[name] = float(f"{row[name]:.4g}")
    assert [row[0] for row in seen["first"]] == order("density", -1)[:50]
    assert [row[0] for row in seen["by_spread"]] == order("layer_std", -1)[:50]
    assert [row[0] for row in seen["by_spread_again"]] == order("layer_std", 1)[:50]
    assert [row[0] for row in seen["second_page"]] == order("layer_std", 1)[50:100]
    assert [order for _, order in seen["sorted"]] == ["ascending"]
    shown = {row[0]: row for row in seen["first"]}
    for row in latents:
        if (cells := shown.get(str(row["latent"]))) is not None:
            assert cells[4] == number(row["layer_mean"])
            assert cells[8] == number(row["token_entropy"])

    above = [str(row["latent"]) for row in alive if float(f"{row['layer_mean']:.4g}") >= 1.5]
    assert set(above[:50]) >= {row[0] for row in seen["filtered"]} != set()
    assert f"of {len(above)} latents (120 without these filters)" in seen["status"]
    assert [row[0] for row in seen["by_text"]] == ["17"]
    assert sorted(row[0] for row in seen["by_id"]) == ["17", "5"]

    assert seen["expanded"] == "true"
    assert "Strongest examples" in seen["detail"]
    assert "layer 1, value 4, sequence 3, position 8" in seen["detail"]
    assert "range 2" in seen["detail"]
    assert len(seen["examples"]) == 3
    line, marks, shaded = seen["examples"][0]
    assert marks == [" peak17 "]
    assert line == f" some⏎{HOSTILE} of the text 名前 peak17  and so on"
    assert shaded == [[" text", "h5"], [" peak17 ", "h10"]]
    assert len(set(seen["shade"])) == 2
    assert seen["closed"]
    assert seen["linked"]

    for width, (needed, given) in seen["overflow"].items():
        assert needed <= given <= int(width)
    assert seen["box_width"] <= 420
    assert seen["light"] == ["rgb(253, 253, 252)", "rgb(27, 28, 30)"]
    assert seen["dark"] == ["rgb(21, 23, 26)", "rgb(230, 231, 233)"]
    assert (shots / "page.pdf").read_bytes().startswith(b"%PDF-")
