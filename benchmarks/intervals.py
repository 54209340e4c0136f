"""Coverage of 95% intervals from few sequences: how often they hold the truth.

    python -m benchmarks.intervals --model DIR --dataset FILE --out DIR \\
        --json docs/evidence/intervals.json

A population of sequences has a true value; a sample of n sequences gives an interval; the share of
samples whose interval holds the truth is its coverage. Populations are planted, among them far more
skewed ones than text is, and real: held-out sequences of stories260k with an SAE on all its layers.
The intervals are those of `mlsae analyze`, beside percentiles of 1,000 resamples of the same
sample. The text is 1,000 TinyStories, one {"text": …} a line.

Shapes: P sequences of the population, n of a sample, R weightings.
"""

import argparse
import datetime
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.made import commit, machine
from mlsae.analyze.events.plan import plan_events
from mlsae.analyze.measure.bootstrap import (
    LEVEL,
    MAX_GROUPS,
    NUM_RESAMPLES,
    estimate,
    group_weights,
    ratio,
)
from mlsae.analyze.measure.model.cross_entropy import measure
from mlsae.analyze.measure.rows.joint import Joint
from mlsae.analyze.measure.rows.sums import RowSums
from mlsae.analyze.measure.rows.walk import walk
from mlsae.analyze.pairing import Pairing, pair
from mlsae.harvest import HarvestConfig
from mlsae.harvest import run as harvest
from mlsae.models import load
from mlsae.store.read.split import validation_of
from mlsae.train import TrainConfig
from mlsae.train import run as train

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Number = Callable[[Int, Float], Float]
"""A metric of some sequences of the population, (n,), with each weighting of them, (R, n)."""

SIZES = (10, 15, 20, 30, 50)
"""Sequences of a sample."""
CONTEXT_LENGTH = 128
PLANTED_SEQUENCES = 100_000
SETTINGS: dict[str, Any] = {
    "expansion_factor": 16,
    "k": 16,
    "max_rows": 600_000,
    "batch_size": 2048,
    "lr": 1e-3,
    "validation_fraction": 0.3,
    "device": "cpu",
}


def planted(generator: np.random.Generator) -> dict[str, tuple[Float, Float]]:
    """Numerators and denominators of sequences, (P,) each, by the kind of their spread."""
    length = generator.integers(64, 257, PLANTED_SEQUENCES).astype(np.float64)
    size = length.shape
    scatter = length * generator.lognormal(0, 1, size)
    lost = length * (1.5 + 0.5 * generator.normal(size=size))
    return {
        "normal": (length * (2 + generator.normal(size=size)), length),
        "share of tokens": (
            generator.binomial(length.astype(int), generator.beta(18, 2, size)).astype(float),
            length,
        ),
        "exponential": (length * generator.exponential(0.1, size), length),
        "log-normal, σ = 1": (length * generator.lognormal(0, 1, size), length),
        "denominator log-normal": (scatter * generator.lognormal(0, 0.3, size), scatter),
        "noise in both": (lost - length * generator.exponential(0.1, size), lost),
    }


def quotient(numerator_P: Float, denominator_P: Float) -> Number:
    """The ratio of sums over sequences."""

    def number(chosen_n: Int, weights_Rn: Float) -> Float:
        return ratio(weights_Rn @ numerator_P[chosen_n], weights_Rn @ denominator_P[chosen_n])

    return number


def fvu(sums: RowSums) -> Number:
    """FVU of some sequences, whose mean is their own, as `mlsae analyze` computes it."""

    def number(chosen_n: Int, weights_Rn: Float) -> Float:
        some = RowSums(
            reference=sums.reference, offset=sums.offset[chosen_n], scalars=sums.scalars[chosen_n]
        )
        return ratio(*some.weighted(weights_Rn).fvu())

    return number


def mean_of(numbers: list[Number]) -> Number:
    """The mean over layers."""

    def number(chosen_n: Int, weights_Rn: Float) -> Float:
        return np.asarray(np.mean([one(chosen_n, weights_Rn) for one in numbers], axis=0))

    return number


def real(pairing: Pairing, sequences: Int, model: str, place: Path) -> dict[str, Number]:
    """Metrics of held-out sequences: at the middle layer, and the mean over layers."""
    sums, _ = walk(
        pairing,
        sequences,
        batch_rows=4096,
        events=plan_events(pairing, sequences[:0], 1000, {}),
        directory=place,
        joint=Joint(pairing, 0),
        examples=None,
        progress=lambda _: None,
    )
    entropy = measure(load(model), pairing, sequences, batch_rows=4096, progress=lambda _: None)
    assert entropy is not None
    counted, untouched, layers = entropy.counted, entropy.untouched, range(len(sums))
    rows = [of.eligible for of in sums.values()]
    by_layer: dict[str, list[Number]] = {
        "fvu": [fvu(of) for of in rows],
        "cosine": [quotient(of.of("cosine"), of.of("rows")) for of in rows],
        "l1": [quotient(of.of("value"), of.of("rows")) for of in rows],
    }
    by_layer |= {
        "delta_ce": [quotient(entropy.added[i], counted) for i in layers],
        "kl": [quotient(entropy.divergence[i], counted) for i in layers],
        "top1_agreement": [quotient(entropy.agreed[i], counted) for i in layers],
        "loss_recovered_mean": [
            quotient(entropy.mean[i] - untouched - entropy.added[i], entropy.mean[i] - untouched)
            for i in layers
        ],
    }
    found = {"ce": quotient(untouched, counted)}
    for name, numbers in by_layer.items():
        found[f"{name}, middle layer"] = numbers[len(numbers) // 2]
        found[f"{name}, mean over layers"] = mean_of(numbers)
    return found


def coverage(number: Number, num_sequences: int, num_samples: int) -> list[dict[str, float]]:
    """Coverage at each of `SIZES`, of our intervals and of percentiles, and their widths' ratio."""
    truth = number(np.arange(num_sequences), np.ones((1, num_sequences)))[0]
    tail = (1 - LEVEL) / 2
    found = []
    for size in SIZES:
        generator = np.random.default_rng(size)
        resamples = np.concatenate(
            [
                np.ones((1, size)),
                generator.multinomial(size, np.full(size, 1 / size), NUM_RESAMPLES),
            ]
        )
        weights = group_weights(size)
        holds = np.zeros((2, num_samples), dtype=bool)
        widths = np.zeros((2, num_samples))
        for n in range(num_samples):
            chosen = generator.integers(0, num_sequences, size)
            interval = estimate(number(chosen, weights))
            assert interval.low is not None
            assert interval.high is not None
            percentiles: list[float] = np.quantile(
                number(chosen, resamples)[1:], [tail, 1 - tail]
            ).tolist()
            for of, ends in enumerate(([interval.low, interval.high], percentiles)):
                holds[of, n] = ends[0] <= truth <= ends[1]
                widths[of, n] = ends[1] - ends[0]
        ours, theirs = holds.mean(axis=1).tolist()
        width, other = np.median(widths, axis=1).tolist()
        found.append(
            {
                "sequences": size,
                "coverage": round(ours, 4),
                "percentile_coverage": round(theirs, 4),
                "width_ratio": round(width / other, 3),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory of stories260k")
    parser.add_argument("--dataset", required=True, help="TinyStories, .jsonl")
    parser.add_argument("--out", required=True, type=Path, help="store and SAE")
    parser.add_argument("--json", required=True, type=Path, help="result")
    parser.add_argument("--samples", type=int, default=2000, help="samples of each size")
    options = parser.parse_args()
    at_commit = commit()
    torch.set_num_threads(1)
    acts, sae = options.out / "acts", options.out / "sae"
    harvest(
        HarvestConfig(
            model=options.model, dataset=options.dataset, out=acts, context_length=CONTEXT_LENGTH
        )
    )
    train(TrainConfig(cache=acts, out=sae, resume=True, **SETTINGS))
    pairing = pair(acts, sae, torch.device("cpu"))
    split = pairing.validation
    held_out = validation_of(pairing.store, float(split["fraction"]), int(split["seed"]))
    held_out = held_out[:MAX_GROUPS]
    populations: dict[str, Mapping[str, tuple[Number, int]]] = {
        "planted": {
            name: (quotient(*of), PLANTED_SEQUENCES)
            for name, of in planted(np.random.default_rng(0)).items()
        }
    }
    with tempfile.TemporaryDirectory() as place:
        numbers = real(pairing, held_out, options.model, Path(place))
    populations["real"] = {name: (number, len(held_out)) for name, number in numbers.items()}
    measured: dict[str, dict[str, Any]] = {}
    for kind, of in populations.items():
        measured[kind] = {}
        for name, (number, size) in of.items():
            measured[kind][name] = coverage(number, size, options.samples)
            print(kind, name, measured[kind][name], flush=True)
    content = {
        "command": f"python -m benchmarks.intervals {shlex.join(sys.argv[1:])}",
        "commit": at_commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "samples": options.samples,
        "sequences": len(held_out),
        "context_length": CONTEXT_LENGTH,
        "settings": SETTINGS,
        "store": {
            "store_id": pairing.store.stores[0].store_id,
            "encoding": pairing.store.stores[0].encoding,
        },
        "coverage": measured,
    }
    options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    least = min(at["coverage"] for of in measured.values() for sizes in of.values() for at in sizes)
    print(json.dumps({"least_coverage": least}))


if __name__ == "__main__":
    main()
