"""Parquet files whose bytes depend on their rows only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet


def write_table(path: Path, columns: Mapping[str, Sequence[Any]], schema: pa.Schema) -> None:
    """Write columns in the schema's order; the file appears whole or not at all."""
    table = pa.table({name: list(columns[name]) for name in schema.names}, schema=schema)
    partial = path.with_name(path.name + ".partial")
    parquet.write_table(table, partial, compression="zstd", store_schema=False)
    partial.replace(path)


def read_table(path: Path) -> dict[str, list[Any]]:
    """Columns by name, as Python values."""
    return parquet.read_table(path).to_pydict()
