"""What a column of a table is."""

from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    name: str
    """Its name."""

    type: pa.DataType
    """Its Arrow type."""

    unit: str
    """Its unit, or `1` for pure numbers."""

    text: str
    """Its definition, and when it is null."""
