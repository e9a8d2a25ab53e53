"""Parquet files whose bytes depend on their rows only.

Row groups hold `ROWS_PER_GROUP` rows, the last one of a file what is left: a reader that streams
holds one group, whatever the size of the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

ROWS_PER_GROUP = 2048


def write_table(path: Path, columns: Mapping[str, Sequence[Any]], schema: pa.Schema) -> None:
    """Write columns in the schema's order; the file appears whole or not at all."""
    write_arrow(path, pa.table({name: list(columns[name]) for name in schema.names}, schema=schema))


def write_arrow(path: Path, table: pa.Table) -> None:
    """Write a table; the file appears whole or not at all."""
    # Named by process: a run that was killed may have left a writer that still ends its file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    parquet.write_table(
        table, partial, compression="zstd", store_schema=False, row_group_size=ROWS_PER_GROUP
    )
    partial.replace(path)


def read_table(path: Path) -> dict[str, list[Any]]:
    """Columns by name, as Python values."""
    return parquet.read_table(path).to_pydict()


def stream_tables(
    paths: Iterable[Path], columns: Sequence[str] | None = None, num_rows: int = ROWS_PER_GROUP
) -> Iterator[dict[str, list[Any]]]:
    """Columns of a few rows at a time, file after file; memory is that of one row group.

    Args:
        paths: Parquet files.
        columns: Names of those wanted; all by default.
        num_rows: Most rows at a time.
    """
    for path in paths:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(num_rows, columns=columns, use_threads=False):
                yield batch.to_pydict()
