"""One small trained transformer and its four random variants on two texts, harvested.

Writes docs/evidence/harvest.json and the figure of docs/evidence/harvest.md: the mean norm of the
residual stream and the cosine of adjacent layers, by layer, from the stores' moments.

    python -m benchmarks.harvest_variants --model STORIES260K --tinystories FILE --wikitext2 FILE
"""

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.made import commit, machine
from benchmarks.markdown import EVIDENCE
from mlsae.harvest import HarvestConfig, run
from mlsae.models.weights.initialization import INITS
from mlsae.store import open_store

mpl.use("agg")

CONTEXT_LENGTH = 256
BATCH_SIZE = 32
SITE = "resid_post"
FIGURE = "harvest/norm_cosine.png"


def harvested(model: str, text: str, init: str, out: Path) -> dict[str, Any]:
    """One harvest, and what its moments say of each layer."""
    run(
        HarvestConfig(
            model=model,
            dataset=text,
            out=out,
            init=init,
            context_length=CONTEXT_LENGTH,
            batch_size=BATCH_SIZE,
            device="cpu",
        )
    )
    store = open_store(out)
    moments = store.moments(SITE, skip_positions=1)
    return {
        "init": init,
        "store_id": store.store_id,
        "num_tokens": store.num_tokens,
        "num_rows": moments.count,
        "mean_norm": moments.norm_mean.tolist(),
        "max_abs": moments.max_abs.tolist(),
        "variance": (moments.m2.sum(axis=1) / moments.count).tolist(),
        "adjacent_cosine": moments.adjacent_cosine().tolist(),
    }


def draw(texts: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A column a text, a line a variant: norms above, cosines below."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(texts), figsize=(9, 6), sharex=True, sharey="row", layout="constrained"
    )
    for (name, variants), (norms, cosines) in zip(texts.items(), axes.T, strict=True):
        for variant in variants:
            style = {"color": "black", "linewidth": 2.2} if variant["init"] == "trained" else {}
            norms.plot(variant["mean_norm"], marker="o", label=variant["init"], **style)
            places = [place + 0.5 for place in range(len(variant["adjacent_cosine"]))]
            cosines.plot(places, variant["adjacent_cosine"], marker="o", **style)
        norms.set(title=name, yscale="log")
        cosines.set(xlabel="layer (a cosine stands between its two)")
        cosines.set_xticks(range(len(variants[0]["mean_norm"])))
        for axis in (norms, cosines):
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("mean L2 norm of resid_post")
    axes[1, 0].set_ylabel("cosine to the next layer,\nabout the layers' means")
    axes[0, 0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Harvest, draw, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for flag in ("--model", "--tinystories", "--wikitext2"):
        parser.add_argument(flag, required=True)
    arguments = parser.parse_args()
    at_commit = commit()
    texts = {"TinyStories": arguments.tinystories, "WikiText-2": arguments.wikitext2}
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, text in texts.items():
            found[name] = [
                harvested(arguments.model, text, init, Path(directory) / name / init)
                for init in INITS
            ]
    draw(found, EVIDENCE / FIGURE)
    content = {
        "command": "python -m benchmarks.harvest_variants --model STORIES260K "
        "--tinystories tinystories_1000.jsonl --wikitext2 wikitext2_valid.txt",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": at_commit,
        "machine": machine(),
        "context_length": CONTEXT_LENGTH,
        "texts": found,
    }
    (EVIDENCE / "harvest.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
