"""Values as producers have them, in arrays and numbers of any library, made plain."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.base.words import Key
from mlsae.store.format.encoding import Stored

Array = npt.NDArray[Any]
Rows = Array | Stored
"""Floats, or values as stored: of int8 the quanta and their exponents."""


def as_array(name: str, values: Any) -> Array:
    """A numpy array of an array, a list, or a tensor of torch on any device.

    Floats that numpy does not have, such as bfloat16, become float32, which holds them exactly.

    Raises:
        InputError: the values are no array, or some of them are masked.
    """
    if type(values) is np.ndarray and values.dtype.kind != "V":
        return values
    if isinstance(getattr(values, "dtype", None), np.dtype) and not hasattr(values, "__array__"):
        # Read when it is sliced; it may be longer than memory.
        found: Array = values
        return found
    if np.ma.is_masked(values):
        raise InputError(f"{name} must be an array without masked values: fill them first")
    try:
        if hasattr(values, "detach"):
            values = values.detach().cpu()
            # Only what numpy has a type of is taken over as it is.
            if "bfloat16" in str(values.dtype) or "float8" in str(values.dtype):
                values = values.float()
            values = values.numpy()
        array = np.asarray(values)
        if array.dtype.kind == "V":
            array = array.astype(np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{name} must be an array of numbers, got {type(values).__name__} ({reason})"
        ) from None
    if array.ndim == 0:
        raise InputError(f"{name} must be an array of numbers, got {type(values).__name__}")
    return array


def as_rows(activations: Mapping[Key, Any]) -> dict[Key, Rows]:
    """Rows of each (site, layer) as arrays of numpy.

    Raises:
        InputError: the argument is no mapping, or some rows are no array.
    """
    if not isinstance(activations, Mapping):
        raise InputError(
            f"expected a mapping of (site, layer) to rows, got {type(activations).__name__}"
        )
    found: dict[Key, Rows] = {}
    for key, rows in activations.items():
        name = f"activations of {key}"
        if isinstance(rows, tuple):
            found[key] = tuple(as_array(name, part) for part in rows)
        else:
            found[key] = as_array(name, rows)
    return found


def as_json(name: str, value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A JSON object, numbers of numpy in it made plain; None stays None.

    Raises:
        InputError: some value has no form in JSON.
    """
    if value is None:
        return None
    try:
        found = json.loads(json.dumps(value, allow_nan=False, default=_plain))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{name} must be a JSON object, got {type(value).__name__}")
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} {str(value)[:40]!r} has no form in JSON")
