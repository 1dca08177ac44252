"""Where a name lies, as one number: its id has the number of the table in the upper bits, the row in the lower ones."""

from __future__ import annotations

from typing import Any

__all__ = ["ROW_BITS", "ROW_MASK", "id_of", "row_of", "table_of"]

ROW_BITS = 40
ROW_MASK = (1 << ROW_BITS) - 1


def table_of(ids: Any) -> Any:
    """Return the number of the table of an id, or of each of an array; -1 for the id -1."""
    return ids >> ROW_BITS


def row_of(ids: Any) -> Any:
    """Return the row of an id, or of each of an array."""
    return ids & ROW_MASK


def id_of(number: int, rows: Any) -> Any:
    """Return the id of a row of a table, or of each of an array of rows."""
    return rows | number << ROW_BITS
