"""Conditions on the columns of a table, such as `density > 1e-5 and num_layers >= 3`.

A small language: numbers, true and false, names of columns, + - * /, comparisons (also chained, as
in `1 <= layer_mean < 3`), and, or, not, parentheses. Python's parser reads a condition, which is
evaluated here node by node and never run as Python.
"""

import ast
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mlsae.base.errors import InputError

_LONGEST = 1000
"""Characters of a condition."""

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: pc.add,
    ast.Sub: pc.subtract,
    ast.Mult: pc.multiply,
    ast.Div: pc.divide,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
}
_LANGUAGE = "numbers, columns, + - * /, comparisons, and, or, not"
_CONSTANTS = {"true": True, "false": False}


def where(table: pa.Table, condition: str) -> pa.Table:
    """The rows of a table for which a condition holds, in their order.

    Numbers are float64. A comparison with null is neither true nor false, and a row for which the
    condition is neither is left out. Dividing by 0 gives ±∞ or NaN.

    Args:
        table: a table with columns of numbers or booleans.
        condition: a text in the language above.

    Raises:
        InputError: the text cannot be read, is no condition, or names a column that is missing or
            holds other values.
    """
    text = " ".join(condition.split())
    if len(text) > _LONGEST:
        raise InputError(
            f"--where: expected at most {_LONGEST} characters, got {len(text)}: say less"
        )
    try:
        found = _Reader(table, text).condition(_parse(text))
    except (RecursionError, MemoryError):
        raise InputError("--where: the condition is nested too deeply: say less") from None
    if isinstance(found, pa.Scalar):
        return table if found.as_py() else table.slice(0, 0)
    return table.filter(found)


def _parse(text: str) -> ast.expr:
    try:
        with warnings.catch_warnings():
            # Python warns of `1or 2` and the like, which are clear here.
            warnings.simplefilter("ignore")
            return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise InputError(
            f"--where: cannot read {text!r} at character {error.offset}: {error.msg}"
        ) from None


class _Reader:
    """Evaluates the nodes of one condition over one table."""

    def __init__(self, table: pa.Table, text: str) -> None:
        self._table = table
        self._text = text

    def condition(self, node: ast.expr) -> Any:
        """True or false for a node, by row or for all rows."""
        found = self._value(node)
        if not pa.types.is_boolean(found.type):
            raise InputError(
                f"--where: {self._of(node)} is a number where a condition is expected: compare it, "
                f"as in {self._of(node)} > 0"
            )
        return found

    def _number(self, node: ast.expr) -> Any:
        found = self._value(node)
        if pa.types.is_boolean(found.type):
            raise InputError(f"--where: {self._of(node)} is true or false, no number")
        return found

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() as value):
                return pa.scalar(value)
            case ast.Constant(value=int() | float() as value):
                return pa.scalar(self._float(value), pa.float64())
            case ast.Name(id=name):
                return self._column(name)
            case ast.BoolOp(op=op, values=nodes):
                join = pc.and_kleene if isinstance(op, ast.And) else pc.or_kleene
                found = self.condition(nodes[0])
                for other in nodes[1:]:
                    found = join(found, self.condition(other))
                return found
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                return pc.invert(self.condition(inner))
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return pc.negate(self._number(inner))
            case ast.BinOp(op=arithmetic, left=left, right=right) if (
                type(arithmetic) in _ARITHMETIC
            ):
                return _ARITHMETIC[type(arithmetic)](self._number(left), self._number(right))
            case ast.Compare() if all(type(op) in _COMPARISONS for op in node.ops):
                return self._comparison(node)
        raise InputError(f"--where: {self._of(node)} is not understood; there are {_LANGUAGE}")

    def _comparison(self, node: ast.Compare) -> Any:
        sides = [self._value(side) for side in (node.left, *node.comparators)]
        for (left, right), op in zip(pairwise(sides), node.ops, strict=True):
            kinds = {pa.types.is_boolean(left.type), pa.types.is_boolean(right.type)}
            ordered = not isinstance(op, ast.Eq | ast.NotEq)
            if len(kinds) == 2 or (ordered and kinds == {True}):
                raise InputError(
                    f"--where: {self._of(node)} compares true or false with a number or by order; "
                    f"use == or != and true or false"
                )
        parts = [
            _COMPARISONS[type(op)](left, right)
            for (left, right), op in zip(pairwise(sides), node.ops, strict=True)
        ]
        found = parts[0]
        for part in parts[1:]:
            found = pc.and_kleene(found, part)
        return found

    def _float(self, value: float) -> float:
        try:
            return float(value)
        except OverflowError:
            raise InputError("--where: a number is too large; write it as 1e300") from None

    def _column(self, name: str) -> Any:
        if name in _CONSTANTS:
            return pa.scalar(_CONSTANTS[name])
        check_columns("--where", self._table, [name])
        column = self._table[name]
        if pa.types.is_boolean(column.type):
            return column
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            raise InputError(
                f"--where: the column {name!r} holds neither numbers nor true and false, so no "
                f"condition can name it"
            )
        return column.cast(pa.float64())

    def _of(self, node: ast.expr) -> str:
        return repr(ast.get_source_segment(self._text, node))


def check_named_latents(table: pa.Table, condition: str) -> None:
    """Require that latents which a condition names by index, as in `latent == 7`, are there.

    Args:
        table: a table with a column `latent`.
        condition: a condition that `where` can read.

    Raises:
        InputError: a latent is missing; the message names those there are.
    """
    there = set(table["latent"].to_pylist())
    for node in ast.walk(_parse(" ".join(condition.split()))):
        match node:
            case ast.Compare(
                left=ast.Name(id="latent"),
                ops=[ast.Eq()],
                comparators=[ast.Constant(value=int()) | ast.UnaryOp(op=ast.USub()) as other],
            ):
                latent = ast.unparse(other)
                if there and latent not in {str(index) for index in there}:
                    ends = f"{min(there)} to {max(there)}"
                    raise InputError(f"--where: there is no latent {latent}; there are {ends}")


def check_columns(option: str, table: pa.Table, names: list[str]) -> None:
    """Require that a table has columns of these names.

    Raises:
        InputError: a column is missing, and the message names those there are; or one comes twice.
    """
    for name in names:
        if name not in table.column_names:
            raise InputError(
                f"{option}: there is no column {name!r}; there are {', '.join(table.column_names)}"
            )
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{option}: the column {twice[0]!r} is given twice; give each once")
