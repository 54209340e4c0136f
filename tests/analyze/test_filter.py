"""Conditions on columns: what they choose, against plain Python, and what they refuse."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlsae.analyze.results.text.filter import where
from mlsae.base.errors import InputError

ROWS: list[dict[str, Any]] = [
    {
        "latent": n,
        "density": density,
        "num_layers": num_layers,
        "layer_mean": mean,
        "dead": density == 0,
    }
    for n, (density, num_layers, mean) in enumerate(
        [(0.0, 0, None), (1e-6, 1, 3.0), (1e-5, 3, 2.5), (2e-5, 3, 0.5), (0.4, 6, 2.5)]
    )
]
TABLE = pa.Table.from_pylist(ROWS)


def _chosen(condition: str) -> list[int]:
    return [int(n) for n in where(TABLE, condition)["latent"].to_pylist()]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("density > 1e-5 and num_layers >= 3", [3, 4]),
        ("density >= 1e-5", [2, 3, 4]),
        ("dead", [0]),
        ("not dead", [1, 2, 3, 4]),
        ("dead == true or latent == 4", [0, 4]),
        ("dead != False", [0]),
        ("1 <= num_layers < 6", [1, 2, 3]),
        ("num_layers / 2 == 1.5 and latent - 1 < 2", [2]),
        ("-latent * 2 + 1 < -4", [3, 4]),
        ("not (latent == 1 or latent == 2) and num_layers", None),
        ("layer_mean > 1", [1, 2, 4]),
        ("not layer_mean > 1", [3]),
        ("layer_mean > 1 or dead", [0, 1, 2, 4]),
        ("layer_mean == 2.5 and\n  density > 0.1", [4]),
        ("num_layers / latent > 0", [1, 2, 3, 4]),
        ("1 / num_layers > 1", [0]),
        ("1 < 2", [0, 1, 2, 3, 4]),
        ("1 > 2 and dead", []),
        ("true", [0, 1, 2, 3, 4]),
        ("latent == 1or latent == 2", [1, 2]),
    ],
)
def test_conditions_choose_rows(condition: str, expected: list[int] | None) -> None:
    if expected is None:
        with pytest.raises(InputError, match="'num_layers' is a number where a condition"):
            _chosen(condition)
    else:
        assert _chosen(condition) == expected


_NUMBERS = st.recursive(
    st.sampled_from(["latent", "density", "num_layers", "2", "0.5", "1e-5"]),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(
        lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
    ),
    max_leaves=4,
)
_COMPARED = st.tuples(_NUMBERS, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), _NUMBERS)
_CONDITIONS = st.recursive(
    st.one_of(st.just("dead"), _COMPARED.map(" ".join)),
    lambda inner: st.one_of(
        inner.map(lambda text: f"not ({text})"),
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(
            lambda parts: f"({parts[0]}) {parts[1]} ({parts[2]})"
        ),
    ),
    max_leaves=5,
)


@given(_CONDITIONS)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # Machines may be busy.
def test_any_condition_means_what_it_means_in_python(condition: str) -> None:
    expected = [row["latent"] for row in ROWS if eval(condition, {}, dict(row))]
    assert _chosen(condition) == expected


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (
            "densty > 1",
            "--where: there is no column 'densty'; there are latent, density, num_layers, "
            "layer_mean, dead",
        ),
        (
            "density",
            "--where: 'density' is a number where a condition is expected: compare it, as in "
            "'density' > 0",
        ),
        ("dead + 1 > 0", "--where: 'dead' is true or false, no number"),
        (
            "dead > 1",
            "--where: 'dead > 1' compares true or false with a number or by order; use == or != "
            "and true or false",
        ),
        (
            "density > 1 & dead",
            "--where: '1 & dead' is not understood; there are numbers, columns, + - * /, "
            "comparisons, and, or, not",
        ),
        ("latent == 'a'", "--where: \"'a'\" is not understood; there are numbers, columns, "),
        ("__import__('os').getcwd() == 1", "--where: \"__import__('os').getcwd()\" is not under"),
        ("dead.real == 1", "--where: 'dead.real' is not understood"),
        ("latent ** 9999 > 1", "--where: 'latent ** 9999' is not understood"),
        ("latent in [1]", "--where: 'latent in [1]' is not understood"),
        ("(lambda: dead)()", "--where: '(lambda: dead)()' is not understood"),
        ("None", "--where: 'None' is not understood"),
        ("1j > 2", "--where: '1j' is not understood"),
        ("density >", "--where: cannot read 'density >' at character "),
        ("", "--where: cannot read '' at character "),
        ("dead = true", "--where: cannot read 'dead = true' at character "),
        ("latent < " + "9" * 400, "--where: a number is too large; write it as 1e300"),
        ("not " * 240 + "dead and " + "(" * 5, "--where: "),
        ("-" * 990 + "1 < 0", "--where: the condition is nested too deeply: say less"),
        (
            "dead or " * 200 + "dead",
            "--where: expected at most 1000 characters, got 1604: say less",
        ),
    ],
)
def test_what_is_no_condition_is_refused_in_one_line(condition: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        _chosen(condition)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_numbers_are_floats_of_double_precision() -> None:
    table = pa.table({"latent": np.arange(3), "total": [2.0**53, 1 / 3, math.inf]})
    assert where(table, "total * 3 == 1")["latent"].to_pylist() == [1]
    assert where(table, "total > 1e308")["latent"].to_pylist() == [2]
