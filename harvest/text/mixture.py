"""Several data sets in given shares of the tokens: names, and the order of documents."""

import math
from collections.abc import Sequence

from mlsae.base.errors import InputError
from mlsae.base.files import local_path


def parse_mixture(datasets: Sequence[str]) -> dict[str, float]:
    """Parse data sets such as `A:0.7`, `B:0.3` to shares of the tokens, which sum to 1.

    Weights count by their ratio. One data set needs none; several need one each. A path that is
    there is a name as it stands, whatever follows its colon.

    Raises:
        InputError: no data set, one without a weight, named twice, or with a weight that is no
            positive number.
    """
    if not datasets:
        raise InputError("no data set; name one with --dataset")
    weights: dict[str, float] = {}
    for dataset in datasets:
        name, weight = _split(dataset)
        if name in weights:
            raise InputError(f"--dataset {name} is there twice; name each data set once")
        if weight is None and len(datasets) > 1:
            raise InputError(
                f"--dataset {dataset} is one of {len(datasets)} and has no weight; give each its "
                f"share of the tokens, such as {dataset}:{1 / len(datasets):.3g}"
            )
        weights[name] = 1.0 if weight is None else weight
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def lags_most(taken: Sequence[tuple[int, float]]) -> int:
    """Choose the data set whose next document is due.

    Args:
        taken: (tokens so far, share) of each.

    Returns:
        Index of the data set with the fewest tokens for its share; the first of equals.
    """
    return min(range(len(taken)), key=lambda index: taken[index][0] / taken[index][1])


def _split(dataset: str) -> tuple[str, float | None]:
    name, colon, text = dataset.rpartition(":")
    if local_path(dataset).exists():
        return dataset, None
    try:
        weight = float(text)
    except ValueError:
        return dataset, None
    if not colon:
        return dataset, None
    if not name or not math.isfinite(weight) or weight <= 0:
        raise InputError(
            f"--dataset {dataset}: expected a name and a positive weight, such as A:0.7"
        )
    return name, weight
