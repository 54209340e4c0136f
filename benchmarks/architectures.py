"""Architectures on equal rows: FVU, delta CE and layer findings against measured L0.

Each architecture is one sweep over its own control of sparsity and over seeds, on the same rows in
the same order, and its SAEs are analyzed on the same held-out sequences; `mlsae` commands do all.

    python -m benchmarks.architectures --work DIR --json docs/evidence/architectures.json \
        NAME=STORE …

Runs and analyses that --work has are not made again. The page is written beside the JSON.
"""

import argparse
import datetime
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.made import commit, machine
from benchmarks.markdown import made, paragraph, table
from mlsae.analyze import load
from mlsae.store import open_store

TARGETS = (8, 16, 32, 64)
_TARGETS = ",".join(map(str, TARGETS))
SWEEPS = {
    "topk": ("-k", _TARGETS),
    "batchtopk": ("--architecture", "batchtopk", "-k", _TARGETS),
    "matryoshka": ("--architecture", "batchtopk", "--matryoshka", "4", "-k", _TARGETS),
    "jumprelu": ("--architecture", "jumprelu", "--target-l0", _TARGETS),
    "gated": ("--architecture", "gated", "--l1", "0.02,0.04,0.08,0.16"),
    "relu": ("--architecture", "relu", "--l1", "0.005,0.01,0.02,0.04"),
}
"""Options of each sweep; the last one sets the sparsity, in AIMED the L0 itself."""
AIMED = ("topk", "batchtopk", "matryoshka", "jumprelu")


def run(*arguments: str) -> None:
    """Run `mlsae`; an SAE that diverged in a sweep leaves the others."""
    subprocess.run([sys.executable, "-m", "mlsae", *arguments], stdout=sys.stderr, check=False)


def figures(sae: Path, store: Path, control: str, analyzes: bool) -> dict[str, Any]:
    """Settings and figures of one SAE, those of its analysis included."""
    record = json.loads((sae / "training.json").read_text())
    settings, metrics = record["settings"], record["metrics"]["position_0_out"]
    entries = metrics["layers"]
    found = {
        "seed": settings["seed"],
        "control": settings[control],
        "latents": settings["num_latents"],
        "steps": settings["num_steps"],
        "l0": fmean(entry["l0"] for entry in entries),
        "l0_by_layer": [entry["l0"] for entry in entries],
        "fvu": fmean(entry["fvu"] for entry in entries),
        "fvu_pca": fmean(entry["fvu_pca"] for entry in entries),
        "dead": metrics["dead_fraction"],
    }
    if not analyzes:
        return found
    analysis = sae.parents[1] / f"{sae.parent.name}-analyses" / sae.name
    if not (analysis / "summary.json").exists():
        run(
            "analyze", "--cache", str(store), "--sae", str(sae), "--out", str(analysis),
            "--no-figures", "--device", "cpu",
        )  # fmt: skip
    summary = load(analysis).summary["overall"]
    return {
        **found,
        "delta_ce": summary.get("mean_delta_ce"),
        "layer_std": summary["mean_layer_std"],
    }


def measure(
    name: str, path: Path, work: Path, rows: str, more: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    """All sweeps on a store."""
    store = open_store(path)
    layers = more[more.index("--layers") + 1] if "--layers" in more else None
    found = {}
    for architecture, options in SWEEPS.items():
        out = work / name / architecture
        if not (out / "summary.json").exists():
            run(
                "train", "--cache", str(path), "--out", str(out), "--max-rows", rows, "--device",
                "cpu", "--resume", "--seed", ",".join(map(str, seeds)), "--data-seed", "0", *more,
                *options,
            )  # fmt: skip
        found[architecture] = [
            figures(
                file.parent,
                path,
                options[-2].lstrip("-").replace("-", "_"),
                json.loads(file.read_text())["settings"]["seed"] == seeds[0],
            )
            for file in sorted(out.rglob("training.json"))
        ]
        print(name, architecture, len(found[architecture]), flush=True)
    return {
        "name": name,
        "rows": rows,
        "options": list(more),
        "layers": layers or f"{store.layers[0]}–{store.layers[-1]}",
        "d_model": store.d_model,
        "seeds": list(seeds),
        "saes": found,
    }


def at_l0(saes: Sequence[dict[str, Any]], l0: float, value: str) -> float | None:
    """A figure at an L0, along straight lines in log L0 between a seed's SAEs; None outside."""
    points = sorted((math.log(sae["l0"]), float(sae[value])) for sae in saes if sae["l0"] > 0)
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 - 1e-9 <= math.log(l0) <= x1 + 1e-9 and x1 > x0:
            return y0 + (y1 - y0) * (math.log(l0) - x0) / (x1 - x0)
    return None


def _spread(values: Sequence[float], digits: int) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    half = (max(values) - min(values)) / 2
    return f"{fmean(values):.{digits}f} ± {half:.{digits}f}"


def measured(study: dict[str, Any]) -> str:
    """Table of every architecture and setting: means over seeds, half the range behind ±."""
    lines = []
    for architecture, saes in study["saes"].items():
        for control in sorted({sae["control"] for sae in saes}):
            group = [sae for sae in saes if sae["control"] == control]
            (shown,) = (sae for sae in group if sae["seed"] == study["seeds"][0])
            lines.append(
                [
                    architecture,
                    f"{control:g}",
                    _spread([sae["l0"] for sae in group], 2),
                    f"{min(shown['l0_by_layer']):.1f}–{max(shown['l0_by_layer']):.1f}",
                    _spread([sae["fvu"] for sae in group], 4),
                    f"{shown['fvu_pca']:.4f}",
                    "–" if shown.get("delta_ce") is None else f"{shown['delta_ce']:.3f}",
                    f"{fmean(sae['dead'] for sae in group):.1%}",
                    f"{shown['layer_std']:.3f}",
                ]
            )
    head = [
        "architecture",
        "set to",
        "L0",
        "L0 by layer",
        "FVU",
        "PCA",
        "delta CE",
        "dead",
        "spread",
    ]
    return table(head, lines)


def equal(study: dict[str, Any]) -> str:
    """Table of FVU at equal L0, first seed."""
    lines = []
    for architecture, saes in study["saes"].items():
        first = [sae for sae in saes if sae["seed"] == study["seeds"][0]]
        cells = [at_l0(first, l0, "fvu") for l0 in TARGETS]
        if any(cells):
            lines.append([architecture, *("–" if c is None else f"{c:.4f}" for c in cells)])
    return table(["architecture", *(f"L0 {l0}" for l0 in TARGETS)], lines)


def off_target(study: dict[str, Any]) -> str:
    """Sentence about how far measured L0 is from the one asked."""
    parts = []
    for architecture in AIMED:
        saes = study["saes"].get(architecture, [])
        if saes:
            worst = max(abs(sae["l0"] / sae["control"] - 1) for sae in saes)
            parts.append(f"{architecture} {worst:.1%}")
    return paragraph(
        "Measured L0 is off the L0 that was asked by at most: " + ", ".join(parts) + "."
    )


def page(content: dict[str, Any]) -> str:
    """Markdown of the evidence page."""
    sections = []
    for study in content["studies"]:
        seeds = study["seeds"]
        intro = paragraph(
            f"Layers {study['layers']}, d_model {study['d_model']}, {study['rows']} rows"
            f"{', ' + ' '.join(study['options']) if study['options'] else ''}; "
            f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}, all on the same rows in the same "
            f"order."
        )
        parts = [f"## {study['name']}", intro, measured(study), off_target(study)]
        sections += [*parts, "FVU at equal L0, along straight lines in log L0:", equal(study)]
    body = "\n\n".join(sections)
    about = paragraph(
        "FVU, L0 and PCA are means over layers on held-out rows; *PCA* has as many directions as "
        "the SAE has active latents. *L0 by layer* is the least and the most over layers, *spread* "
        "the mean standard deviation of a living latent's layer; they, *delta CE* and PCA are of "
        "the first seed. Behind ± is half the range over seeds."
    )
    return f"""# Architectures on equal rows

<!-- Made by `python -m benchmarks.architectures`; edit benchmarks/architectures.py. -->

{about}

{body}

## How it was made

<!-- not run: needs the stores, and an hour -->
```sh
python -m benchmarks.architectures --work runs/architectures \\
    --json docs/evidence/architectures.json NAME=STORE
```

{made(content)}
"""


def main() -> None:
    """Measure, and write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("studies", nargs="+", metavar="NAME=STORE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", default="1M")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--options", default="-R 16", help="further options of each training run")
    arguments = parser.parse_args()
    seeds = [int(word) for word in arguments.seeds.split(",")]
    studies = []
    if arguments.json.exists():
        studies = json.loads(arguments.json.read_text())["studies"]
    for study in arguments.studies:
        name, store = study.split("=")
        options = arguments.options.split()
        found = measure(name, Path(store), arguments.work, arguments.rows, options, seeds)
        studies = [one for one in studies if one["name"] != name] + [found]
    content = {
        "studies": studies,
        "machine": machine(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    arguments.json.with_suffix(".md").write_text(page(content))


if __name__ == "__main__":
    main()
