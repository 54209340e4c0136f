"""Defaults of `mlsae train` against the best of a grid of batch sizes and learning rates.

For each store and each number of rows, one run gets no option but the store, the rows and --out.
Then each batch size is a run, with an SAE for each learning rate, multiples of the first run's.
The figure is the mean over layers of the held-out rows' FVU; PCA with as many directions as the
SAE has active latents stands beside. An SAE may buy FVU with latents that die, so the best of
those that keep nine latents in ten stands beside the best.

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

FACTORS = "0.25,0.5,1,2"
MOST_DEAD = 0.1
"""Share of dead latents that is few."""


def train(store: Path, rows: int, out: Path, *options: str) -> list[dict[str, Any]]:
    """Train, unless that was done; the finished SAEs' records."""
    command = [sys.executable, "-m", "mlsae", "train", "--cache", str(store), "--out", str(out)]
    command += ["--max-rows", str(rows), "--device", "cpu", "--resume", *options]
    if not (out / "summary.json").exists() and not (out / "training.json").exists():
        subprocess.run(command, check=False, stdout=sys.stderr)
    return [json.loads(path.read_text()) for path in sorted(out.rglob("training.json"))]


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """Settings and figures of an SAE that the grid is about."""
    settings, metrics = record["settings"], record["metrics"]["position_0_out"]
    layers = metrics["layers"]
    return {
        "batch": settings["batch_size"],
        "lr": settings["lr"],
        "steps": settings["num_steps"],
        "latents": settings["num_latents"],
        "fvu": fmean(entry["fvu"] for entry in layers),
        "dead": metrics["dead_fraction"],
        "worst_of_pca": max(entry["fvu"] / entry["fvu_pca"] for entry in layers),
    }


def measure(
    name: str,
    path: Path,
    rows: int,
    batches: Sequence[int],
    factors: Sequence[float],
    work: Path,
    options: Sequence[str],
) -> dict[str, Any]:
    """The run with defaults, and the grid about it."""
    store = open_store(path)
    where = work / f"{name}-{rows}"
    (default,) = map(figures, train(path, rows, where / "default", *options))
    rates = ",".join(f"{factor * default['lr']:.3g}" for factor in factors)
    grid: list[dict[str, Any]] = []
    for batch in batches:
        out = where / f"batch{batch}"
        given = ("--batch-size", str(batch), "--lr", rates, *options)
        grid += map(figures, train(path, rows, out, *given))
    return {
        "name": name,
        "rows": rows,
        "d_model": store.d_model,
        "layers": len(store.layers),
        "epoch_rows": store.num_rows * len(store.layers),
        "options": list(options),
        "grid": grid,
        "default": default,
    }


def best(study: dict[str, Any], most_dead: float = 1.0) -> dict[str, Any]:
    """The run with the lowest FVU among those with no more dead latents."""
    tried = [*study["grid"], study["default"]]
    return min((e for e in tried if e["dead"] <= most_dead), key=lambda entry: entry["fvu"])


def _against(study: dict[str, Any], found: dict[str, Any]) -> str:
    return (
        f"{study['default']['fvu'] / found['fvu']:.2f} times {found['fvu']:.4f} (batch "
        f"{found['batch']:,}, learning rate {found['lr']:.2g}, {found['dead']:.0%} dead)"
    )


def page(content: dict[str, Any]) -> str:
    """Markdown of the evidence page."""
    sections = []
    for study in content["studies"]:
        default = study["default"]
        rates = sorted({entry["lr"] for entry in study["grid"]})
        batches = sorted({entry["batch"] for entry in study["grid"]})
        cells = {
            (entry["batch"], entry["lr"]): f"{entry['fvu']:.4f} ({entry['dead']:.0%})"
            for entry in study["grid"]
        }
        rows = [
            [f"{batch:,}", *(cells.get((batch, rate), "diverged") for rate in rates)]
            for batch in batches
        ]
        few = "; none has few dead"
        if any(entry["dead"] <= MOST_DEAD for entry in [*study["grid"], default]):
            few = f", and {_against(study, best(study, MOST_DEAD))}, the best with few dead"
        epochs = study["rows"] / study["epoch_rows"]
        text = paragraph(
            f"{study['layers']} layers, d_model {study['d_model']}, {default['latents']:,} "
            f"latents, {format_count(study['rows'])} rows ({epochs:.2g} epochs"
            f"{', ' + ' '.join(study['options']) if study['options'] else ''}). Defaults: batch "
            f"{default['batch']:,}, {default['steps']:,} steps, learning rate "
            f"{default['lr']:.2g}: FVU **{default['fvu']:.4f}**, {default['dead']:.0%} dead, at "
            f"most {default['worst_of_pca']:.2f} times PCA's at any layer. That is "
            f"{_against(study, best(study))}, the best{few}."
        )
        head = ["batch", *(f"lr {rate:.2g}" for rate in rates)]
        title = f"## {study['name']}, {format_count(study['rows'])} rows"
        sections.append("\n\n".join([title, text, table(head, rows)]))
    about = paragraph(
        "`mlsae train` with nothing but a store, against the best of a grid of batch sizes and "
        "learning rates on the same rows, one seed. FVU is the mean over layers of the held-out "
        f"rows', dead latents in brackets; few of them are {MOST_DEAD:.0%} at most."
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
    NAME=STORE=1M,5M
```

{made(content)}
"""


def _ratio(study: dict[str, Any]) -> float:
    return float(study["default"]["fvu"] / best(study)["fvu"])


def main() -> None:
    """Measure, and write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("studies", nargs="+", metavar="NAME=STORE=ROWS[,ROWS]")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--batches", default="512,1024,2048")
    parser.add_argument(
        "--factors", default=FACTORS, help="multiples of the default's learning rate"
    )
    parser.add_argument("--precision", default="float32")
    arguments = parser.parse_args()
    batches = [int(word) for word in arguments.batches.split(",")]
    factors = [float(word) for word in arguments.factors.split(",")]
    options = [] if arguments.precision == "float32" else ["--precision", arguments.precision]
    studies = []
    if arguments.json.exists():
        studies = json.loads(arguments.json.read_text())["studies"]
    for study in arguments.studies:
        name, store, counts = study.split("=")
        for count in counts.split(","):
            rows = parse_count(count)
            made_now = measure(name, Path(store), rows, batches, factors, arguments.work, options)
            studies = [s for s in studies if (s["name"], s["rows"]) != (name, rows)] + [made_now]
            print(name, rows, f"default / best {_ratio(made_now):.3f}", flush=True)
    content = {
        "studies": studies,
        "machine": machine(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    arguments.json.with_suffix(".md").write_text(page(content))
    ratios = {f"{s['name']} {s['rows']}": _ratio(s) for s in studies}
    print(json.dumps({"benchmark": "defaults", "default / best": ratios}))


if __name__ == "__main__":
    main()
