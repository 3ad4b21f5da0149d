"""The tables that stages exchange: their schemas, and random access to their rows.

Parquet in the store is the truth. `Table` reads it through a node-local, memory-mapped Arrow copy that is made once
per node from verified shards and shared by every process of that node; the copy is a cache and may be deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.typing import NDArray

from pipeline.errors import StoreError
from stages.data.rows import iter_batches

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact
    from pipeline.store.manifest import FileEntry

BOX = pa.list_(pa.float32(), 4)  # x0, y0, x1, y1 in pixels of the stored image (upright), continuous: width = x1 - x0
OBJECT = pa.struct(
    [
        ("box", BOX),
        ("category", pa.string()),
        ("category_id", pa.int32()),  # index into the classes of the artifact's notes
        ("crowd", pa.bool_()),
        ("mask", pa.binary()),  # PNG or COCO RLE json; null where the source has boxes only
    ]
)

SCHEMAS: dict[str, pa.Schema] = {
    "images": pa.schema(
        [
            ("image_id", pa.int64()),  # 0..n-1 in the order of the keys
            ("key", pa.string()),  # path relative to the source
            ("image", pa.binary()),  # encoded bytes as found
            ("width", pa.int32()),  # upright, after EXIF
            ("height", pa.int32()),
            ("sha256", pa.string()),
            ("split", pa.string()),
            ("label", pa.string()),
            ("label_id", pa.int32()),
            ("mask", pa.binary()),  # PNG of class indices
            ("objects", pa.list_(OBJECT)),
            ("sequence", pa.string()),
            ("frame", pa.int32()),
        ]
    ),
    "boxes": pa.schema([("image_id", pa.int64()), ("boxes", pa.list_(BOX))]),  # best first
    "superpixels": pa.schema([("image_id", pa.int64()), ("labels", pa.binary()), ("count", pa.int32())]),  # pack_labels
    "embeddings": pa.schema([("image_id", pa.int64()), ("embedding", pa.list_(pa.float32()))]),  # L2-normalised
    "features": pa.schema(
        [
            ("image_id", pa.int64()),
            ("key", pa.string()),  # of the images' table
            ("vector", pa.list_(pa.float16())),  # as the encoder gives it, not normalised
            ("patches", pa.list_(pa.float16())),  # (grid_height, grid_width, D) in C order: row by row, a vector each
            ("grid_height", pa.int32()),
            ("grid_width", pa.int32()),
        ]
    ),
    "neighbors": pa.schema(
        [
            ("image_id", pa.int64()),
            ("neighbors", pa.list_(pa.int64())),  # image_ids, nearest first, never itself
            ("similarities", pa.list_(pa.float32())),
        ]
    ),
}

# A record batch of the mapped copy has at most so many rows and bytes: bounds the memory that making it needs.
_COPY_ROWS, _COPY_BYTES = 64, 16 << 20
_KEPT_BATCHES = 1 << 16  # of the mapped copy, open at once: 3 KB each
_LABELS_MAGIC = b"TSP1"


# ---------------------------------------------------------------------------------------------------- random access
class Table:
    """Random access by `image_id` to the rows of an artifact.

    `Table.open(artifact, ["image", "width"])` makes the node-local copy if no process of this node has made it yet
    (one does, the others wait), then maps it. Pickles as (artifact, columns), so a worker of another node makes its
    own node's copy. Rows are read in O(1) where ids are 0..n-1, in O(log n) otherwise.
    """

    def __init__(self, folder: Path, artifact: Artifact, columns: tuple[str, ...] | None) -> None:
        self._artifact, self._columns = artifact, columns
        self.ids: NDArray[np.int64] = np.load(folder / "ids.npy", mmap_mode="r")
        self._dense = len(self.ids) > 0 and self.ids[0] == 0 and self.ids[-1] == len(self.ids) - 1
        self._map = pa.memory_map(str(folder / "table.arrow"))
        self._reader = pa.ipc.open_file(self._map)
        self._batches: dict[int, pa.RecordBatch] = {}
        self._starts: NDArray[np.int64] = np.load(folder / "starts.npy")
        self.schema: pa.Schema = self._reader.schema
        self._getters = [(field.name, _getter(field.type)) for field in self.schema]

    @classmethod
    def open(cls, artifact: Artifact, columns: Sequence[str] | None = None) -> Table:
        """Columns default to all of them; `image_id` is always there. Raises ArtifactDamaged, StoreError."""
        names = None if columns is None else tuple(sorted({*columns} - {"image_id"}))
        return cls(_mapped_copy(artifact, names), artifact, names)

    def __reduce__(self) -> tuple[Callable[..., Table], tuple[Any, ...]]:
        return Table.open, (self._artifact, self._columns)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, image_id: int) -> bool:
        return self._find(image_id) is not None

    def row(self, image_id: int) -> dict[str, Any]:
        """One row: lists of numbers come as numpy arrays ((n, 4) for boxes), the rest as plain Python values.

        Raises KeyError when the table has no such image.
        """
        batch, i = self._place(image_id)
        return {name: get(batch.column(c), i) for c, (name, get) in enumerate(self._getters)}

    def take(self, image_ids: Sequence[int] | NDArray[np.int64]) -> pa.Table:
        """The rows of these images, in the order asked for. Raises KeyError."""
        rows = []
        for image_id in image_ids:
            batch, i = self._place(int(image_id))
            rows.append(batch.slice(i, 1))
        return pa.Table.from_batches(rows, schema=self.schema).combine_chunks()

    def column(self, name: str) -> NDArray[Any] | pa.ChunkedArray:
        """One whole column, in the order of `ids`: numpy for numbers ((n, d) for lists of one length), else Arrow."""
        chunks = pa.chunked_array(
            [self._batch(b).column(name) for b in range(len(self._starts))], self.schema.field(name).type
        )
        kind = chunks.type
        if pa.types.is_primitive(kind) and chunks.null_count == 0:
            return chunks.to_numpy()
        if _is_list(kind) and pa.types.is_primitive(kind.value_type) and len(chunks):
            flat = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks.chunks])
            lengths = {n for chunk in chunks.chunks for n in chunk.value_lengths().unique().to_pylist()}
            if len(lengths) == 1 and None not in lengths:
                return flat.reshape(len(chunks), lengths.pop())
        return chunks

    def _find(self, image_id: int) -> int | None:
        if self._dense:
            return image_id if 0 <= image_id < len(self.ids) else None
        row = int(np.searchsorted(self.ids, image_id))
        return row if row < len(self.ids) and self.ids[row] == image_id else None

    def _place(self, image_id: int) -> tuple[pa.RecordBatch, int]:
        row = self._find(image_id)
        if row is None:
            raise KeyError(f"image_id {image_id} is not in {self._artifact.kind}/{self._artifact.fingerprint}")
        b = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batch(b), row - int(self._starts[b])

    def _batch(self, index: int) -> pa.RecordBatch:
        if index not in self._batches:
            if len(self._batches) >= _KEPT_BATCHES:
                self._batches.clear()
            self._batches[index] = self._reader.get_batch(index)
        return self._batches[index]


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _getter(kind: pa.DataType) -> Callable[[pa.Array, int], Any]:
    """How a cell of this type becomes a value: arrays for lists of numbers, without a Python object per number."""
    if _is_list(kind) and pa.types.is_primitive(kind.value_type):
        return lambda column, i: None if (cell := column[i].values) is None else cell.to_numpy()
    if _is_list(kind) and pa.types.is_fixed_size_list(kind.value_type):
        width, dtype = kind.value_type.list_size, kind.value_type.value_type.to_pandas_dtype()

        def fixed(column: pa.Array, i: int) -> Any:
            cell = column[i].values
            if cell is None:
                return None
            return cell.flatten().to_numpy().reshape(-1, width) if len(cell) else np.empty((0, width), dtype)

        return fixed
    return lambda column, i: column[i].as_py()


# ------------------------------------------------------------------------------------------------- the mapped copy
def _mapped_copy(artifact: Artifact, columns: tuple[str, ...] | None) -> Path:
    """The folder of the node's copy, made if it is missing or not whole.

    Its name covers the content of the shards and the columns: a recomputed artifact never meets an old copy.
    """
    shards = list(artifact.shards())
    content = json.dumps([[(shard.name, shard.sha256) for shard in shards], columns]).encode()
    digest = hashlib.sha256(content).hexdigest()[:16]
    folder = artifact.cache / "tables" / f"{artifact.kind}-{artifact.fingerprint[:24]}-{digest}"
    if _whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # the kernel lets go when the holder dies
        if _whole(folder):
            return folder
        _sweep(folder)
        building = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        building.mkdir()
        try:
            _build(building, artifact, shards, columns)
            os.replace(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def _build(folder: Path, artifact: Artifact, shards: list[FileEntry], columns: tuple[str, ...] | None) -> None:
    names = None if columns is None else ["image_id", *columns]
    schema: pa.Schema | None = SCHEMAS.get(artifact.kind)
    if shards:
        schema = pq.read_schema(artifact.local(shards[0].name))
    if schema is None:
        raise StoreError(f"{artifact.kind}/{artifact.fingerprint} has no table: nothing to open (a metrics artifact?)")
    schema = schema.remove_metadata()
    if names is not None:
        if missing := [name for name in names if name not in schema.names]:
            raise StoreError(
                f"{artifact.kind}/{artifact.fingerprint} has no column {', '.join(missing)}: "
                f"it has {', '.join(schema.names)} (ask for one of these, or make the artifact again)"
            )
        schema = pa.schema([schema.field(name) for name in names])
    ids, starts, rows = [], [], 0
    with pa.OSFile(str(folder / "table.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for shard in shards:
            facts = pq.read_metadata(artifact.local(shard.name))
            held = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
            batch_rows = min(max(_COPY_BYTES * facts.num_rows // max(held, 1), 1), _COPY_ROWS)
            for batch in iter_batches(artifact, shard, schema.names, batch_rows=batch_rows):
                writer.write_batch(batch.select(schema.names).cast(schema))
                ids.append(batch.column("image_id").to_numpy())
                starts.append(rows)
                rows += batch.num_rows
    all_ids = np.concatenate(ids) if ids else np.empty(0, np.int64)
    if (np.diff(all_ids) <= 0).any():
        raise StoreError(f"{artifact.kind}/{artifact.fingerprint}: image_id must rise from row to row, and does not")
    np.save(folder / "ids.npy", all_ids)
    np.save(folder / "starts.npy", np.array(starts, np.int64))
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / "whole.json").write_text(json.dumps(sizes))


def _whole(folder: Path) -> bool:
    """All files there at the sizes they were written with: what a full disk or a stray deletion would change."""
    try:
        sizes = json.loads((folder / "whole.json").read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _sweep(folder: Path) -> None:
    """Removes a broken copy and what killed builders left of it; the caller holds the lock."""
    for left in [folder, *folder.parent.glob(f"{folder.name}.*.tmp")]:
        shutil.rmtree(left, ignore_errors=True)


# --------------------------------------------------------------------------------------------------- superpixel maps
def pack_labels(labels: NDArray[np.uint16]) -> bytes:
    """A superpixel map (H, W), labels 0..65535, losslessly small.

    Runs of one label in reading order, lengths and labels compressed apart with zstd: 13.6 KB in 1 ms for a 480x360
    map of 430 superpixels (deflate of the plain map: 20 KB in 2.6 ms; 16-bit PNG: 26 KB in 4.2 ms).
    Raises ValueError for another shape or type.
    """
    labels = np.ascontiguousarray(labels)
    if labels.ndim != 2 or labels.dtype != np.uint16:
        raise ValueError(f"a superpixel map is (H, W) uint16, not {labels.shape} {labels.dtype}")
    flat = labels.ravel()
    starts = np.flatnonzero(np.concatenate([[flat.size > 0], flat[1:] != flat[:-1]]))
    runs = np.diff(starts, append=flat.size)
    pieces = -(-runs // 255)  # a run longer than a byte holds is several of the same label
    lengths = np.full(pieces.sum(), 255, np.uint8)
    lengths[np.cumsum(pieces) - 1] = runs - 255 * (pieces - 1)
    values = np.repeat(flat[starts], pieces).astype("<u2")
    codec = pa.Codec("zstd", compression_level=6)
    packed = codec.compress(lengths.tobytes(), asbytes=True)
    header = np.array([*labels.shape, len(lengths), len(packed)], "<u4").tobytes()
    return _LABELS_MAGIC + header + packed + codec.compress(values.tobytes(), asbytes=True)


def unpack_labels(data: bytes) -> NDArray[np.uint16]:
    """The map that `pack_labels` packed: (H, W) uint16. Raises ValueError for other bytes."""
    if data[:4] != _LABELS_MAGIC:
        raise ValueError("not a packed superpixel map: it must come from pack_labels")
    height, width, runs, size = (int(number) for number in np.frombuffer(data, "<u4", 4, offset=4))
    codec = pa.Codec("zstd")
    lengths = np.frombuffer(codec.decompress(data[20 : 20 + size], runs), np.uint8)
    values = np.frombuffer(codec.decompress(data[20 + size :], runs * 2), "<u2").astype(np.uint16, copy=False)
    return np.repeat(values, lengths).reshape(height, width)
