"""The curves of a training as a table."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq


def curves_table(rows: Sequence[Mapping[str, float]]) -> bytes:
    """The curves as Parquet, a column a name; rows are logged steps."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: pa.array([row.get(name) for row in rows], pa.float64()) for name in names})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
