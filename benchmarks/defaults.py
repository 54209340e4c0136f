"""Defaults of `mlsae train` against the best of a grid of batch sizes and learning rates.

For each store and each number of rows: every batch size is a run, whose SAEs are one for each
learning rate, and one run gets no option but the store, the rows and --out. The figure is the
mean over layers of the held-out rows' FVU; PCA with as many directions as the SAE has active
latents stands beside.

    python -m benchmarks.defaults --work DIR --json docs/evidence/defaults.json \\
        NAME=STORE=ROWS[,ROWS…] …

Runs that --work has are not made again, so a grid can grow. The page is written beside the JSON.
"""

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.made import commit, machine
from benchmarks.markdown import made, paragraph, table
from mlsae.base.units import format_count, parse_count
from mlsae.store import open_store

BATCHES = (512, 1024, 2048, 4096, 8192, 16384)
LEAST_STEPS = 50
"""Fewer are no training: such a batch is left out of the grid."""


def train(store: Path, rows: int, out: Path, *options: str) -> list[dict[str, Any]]:
    """Train, unless that was done; the finished SAEs' records."""
    command = [sys.executable, "-m", "mlsae", "train", "--cache", str(store), "--out", str(out)]
    command += ["--max-rows", str(rows), "--device", "cpu", "--resume", *options]
    if not (out / "summary.json").exists() and not (out / "training.json").exists():
        subprocess.run(command, check=False, stdout=sys.stderr)
    return [json.loads(path.read_text()) for path in sorted(out.rglob("training.json"))]


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """Settings and figures of an SAE that the grid is about."""
    settings, layers = record["settings"], record["metrics"]["position_0_out"]["layers"]
    return {
        "batch": settings["batch_size"],
        "lr": settings["lr"],
        "steps": settings["num_steps"],
        "latents": settings["num_latents"],
        "fvu": fmean(entry["fvu"] for entry in layers),
        "worst_of_pca": max(entry["fvu"] / entry["fvu_pca"] for entry in layers),
    }


def measure(name: str, path: Path, rows: int, rates: Sequence[float], work: Path) -> dict[str, Any]:
    """The grid of a store and a number of rows, and the run with defaults."""
    store = open_store(path)
    where = work / f"{name}-{rows}"
    grid: list[dict[str, Any]] = []
    for batch in BATCHES:
        if rows // batch >= LEAST_STEPS:
            # One run for each rate: those of an earlier, smaller grid stay.
            for rate in rates:
                out = where / f"batch{batch}-lr{rate:g}"
                options = ("--batch-size", str(batch), "--lr", str(rate))
                grid += map(figures, train(path, rows, out, *options))
    (default,) = map(figures, train(path, rows, where / "default"))
    best = min(grid, key=lambda entry: entry["fvu"])
    return {
        "name": name,
        "rows": rows,
        "d_model": store.d_model,
        "layers": len(store.layers),
        "epoch_rows": store.num_rows * len(store.layers),
        "grid": grid,
        "default": default,
        "best": best,
        "is_edge": best["lr"] in (min(rates), max(rates)),
        "default / best": default["fvu"] / best["fvu"],
    }


def page(content: dict[str, Any]) -> str:
    """Markdown of the evidence page."""
    sections = []
    for study in content["studies"]:
        default, best = study["default"], study["best"]
        rates = sorted({entry["lr"] for entry in study["grid"]})
        batches = sorted({entry["batch"] for entry in study["grid"]})
        fvu = {(entry["batch"], entry["lr"]): entry["fvu"] for entry in study["grid"]}
        rows = [
            [
                f"{batch:,}",
                *(f"{fvu[batch, r]:.4f}" if (batch, r) in fvu else "diverged" for r in rates),
            ]
            for batch in batches
        ]
        edge = (
            " The best rate is the grid's last: a better one may lie beyond."
            if (study["is_edge"])
            else ""
        )
        ratio, epochs = default["fvu"] / best["fvu"], study["rows"] / study["epoch_rows"]
        text = paragraph(
            f"{study['layers']} layers, d_model {study['d_model']}, {default['latents']:,} "
            f"latents, {format_count(study['rows'])} rows ({epochs:.2g} epochs). Defaults: batch "
            f"{default['batch']:,}, {default['steps']:,} steps, learning rate "
            f"{default['lr']:.2g}, FVU **{default['fvu']:.4f}**: {ratio:.2f} times the best, "
            f"{best['fvu']:.4f} (batch {best['batch']:,}, learning rate {best['lr']:.2g}), and at "
            f"most {default['worst_of_pca']:.2f} times PCA's at any layer.{edge}"
        )
        head = ["batch", *(f"lr {rate:g}" for rate in rates)]
        title = f"## {study['name']}, {format_count(study['rows'])} rows"
        sections.append("\n\n".join([title, text, table(head, rows)]))
    about = paragraph(
        "`mlsae train` with nothing but a store, against the best of a grid of batch sizes and "
        "learning rates on the same rows, one seed. FVU is the mean over layers of the held-out "
        "rows'."
    )
    body = "\n\n".join(sections)
    return f"""# Defaults of training

<!-- Made by `python -m benchmarks.defaults`; edit benchmarks/defaults.py. -->

{about}

{body}

## How it was made

<!-- not run: needs the stores, and hours -->
```sh
python -m benchmarks.defaults --work runs/defaults --json docs/evidence/defaults.json \\
    stories260k=STORE=1M,10M
```

{made(content)}
"""


def main() -> None:
    """Measure, and write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("studies", nargs="+", metavar="NAME=STORE=ROWS[,ROWS]")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--lr", default="1e-4,2e-4,4e-4,8e-4,1.6e-3")
    arguments = parser.parse_args()
    rates = [float(word) for word in arguments.lr.split(",")]
    studies = []
    for study in arguments.studies:
        name, store, counts = study.split("=")
        for count in counts.split(","):
            rows = parse_count(count)
            studies.append(measure(name, Path(store), rows, rates, arguments.work))
            shown = studies[-1]
            print(name, rows, f"default / best {shown['default / best']:.3f}", flush=True)
    content = {
        "studies": studies,
        "machine": machine(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    arguments.json.with_suffix(".md").write_text(page(content))
    ratios = {f"{s['name']} {s['rows']}": s["default / best"] for s in studies}
    print(json.dumps({"benchmark": "defaults", "default / best": ratios}))


if __name__ == "__main__":
    main()
