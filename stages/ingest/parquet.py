"""Layout `parquet`: tables of encoded images, as plain bytes or as Hugging Face's struct {bytes, path}.

One file, or a folder or bucket prefix of files. A row's key is its file and its number in it.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.errors import SourceError
from stages.data.images import ImageError
from stages.ingest.files import Files, split_address
from stages.ingest.layout import Item, Layout, Listing, Raw, Vocabulary
from stages.ingest.recognise import SPLITS
from stages.ingest.settings import IngestConfig


class Parquet(Layout):
    """Listing reads only labels, paths and splits; a shard's images are read when the shard is made."""

    def __init__(self, config: IngestConfig) -> None:
        self.config = config
        folder, self._only = split_address(config.source)
        self.files = self.mask_files = Files(folder)

    def candidates(self) -> Listing:
        """One candidate a row, without its image."""
        paths = [self._only] if self._only else [path for path in self.files.sizes if path.endswith(".parquet")]
        if not paths:
            raise SourceError(f"source {self.config.source} is not of layout parquet: no *.parquet file in it")
        rows: list[tuple[Item, Any]] = []
        names: list[str] | None = None
        for path in paths:
            rows_of_file, file_names = self._rows(path)
            rows += rows_of_file
            names = names or file_names
        labels = sorted({label for _, label in rows if label is not None}, key=lambda label: (str(type(label)), label))
        if self.config.classes:
            names = list(self.config.classes)
        if names is None:  # numbers without names are called by their number
            numbers = bool(labels) and all(isinstance(label, int) for label in labels)
            names = [str(i) for i in range(max(labels) + 1)] if numbers else [str(label) for label in labels]
        items, problems = [], []
        for item, label in rows:
            known = label is None or not isinstance(label, int) or 0 <= label < len(names)
            if not known and label != -1:  # Hugging Face writes -1 where a test set's label is hidden
                reason = f"label {label} is outside the {len(names)} classes"
                problems.append({"key": item.key, "reason": reason})
                continue
            name = names[label] if isinstance(label, int) and known else None if isinstance(label, int) else label
            items.append(Item(item.key, item.split, item.size, item.image, label=name, annotation=item.annotation))
        masks = self.mask_vocabulary()
        mask_classes = masks.mask_classes if self.config.columns.mask else None
        vocabulary = Vocabulary(tuple(names), mask_classes, masks.ignore_index, masks.label_map)
        return Listing(sorted(items, key=lambda item: item.key), vocabulary, problems)

    def reader(self, items: Sequence[Item]) -> Callable[[Item], Raw]:
        """Reads the row groups that hold these rows, one file at a time, and keeps the cells of `items` only."""
        import pyarrow.parquet as pq

        cells: dict[tuple[str, int], tuple[Any, Any]] = {}
        wanted: dict[str, set[int]] = {}
        for item in items:
            wanted.setdefault(item.image, set()).add(item.annotation)
        columns = self.config.columns
        for path, numbers in wanted.items():
            with self.files.open(path) as stream, pq.ParquetFile(stream) as file:
                first = 0
                for group in range(file.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    here = sorted(number - first for number in numbers if first <= number < first + count)
                    if here:
                        names = [columns.image, *([columns.mask] if columns.mask else [])]
                        table = file.read_row_group(group, columns=names).take(here)
                        masks = table[columns.mask].to_pylist() if columns.mask else [None] * len(here)
                        for number, image, mask in zip(here, table[columns.image].to_pylist(), masks, strict=True):
                            cells[path, first + number] = image, mask
                    first += count

        def read(item: Item) -> Raw:
            image, mask = cells[item.image, item.annotation]
            return Raw(_bytes(image, columns.image) or b"", _bytes(mask, columns.mask or ""))

        return read

    def _rows(self, path: str) -> tuple[list[tuple[Item, Any]], list[str] | None]:
        """(candidate, label) for each row of one file, and the class names that Hugging Face left in its schema."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = self.config.columns
        try:
            with self.files.open(path) as stream, pq.ParquetFile(stream) as file:
                schema, metadata = file.schema_arrow, file.metadata
                label = columns.label if columns.label in schema.names else None
                self._require(path, schema.names)
                struct = pa.types.is_struct(schema.field(columns.image).type)
                read = [f"{columns.image}.path"] if struct and _has_path(schema, columns.image) else []
                read += [name for name in (label, columns.split) if name]
                table = file.read(columns=read) if read else None
        except (pa.ArrowInvalid, OSError) as error:
            raise SourceError(f"{self.config.source}/{path} is not a readable Parquet file: {error}") from None
        count = metadata.num_rows
        size = sum(metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups)) // max(count, 1)
        none = [None] * count
        cells = table[columns.image].to_pylist() if table and columns.image in table.column_names else none
        names = [cell and cell["path"] for cell in cells]  # the cell itself may be null
        labels = table[label].to_pylist() if table and label else none
        splits = table[columns.split].to_pylist() if table and columns.split else none
        default = self._split_of(path)
        rows = []
        for number in range(count):
            inner = f"/{names[number]}" if names[number] else ""
            split = splits[number] or default
            item = Item(f"{path}#{number:08d}{inner}", str(split), size, path, annotation=number)
            if self.config.split_folders is None or split in self.config.split_folders:
                rows.append((item, labels[number]))
        return rows, _class_names(schema, label)

    def _require(self, path: str, names: Sequence[str]) -> None:
        columns = self.config.columns
        needed = [columns.image, columns.mask, columns.split]
        if "label" in columns.model_fields_set:
            needed.append(columns.label)
        if missing := [name for name in needed if name and name not in names]:
            raise SourceError(
                f"{self.config.source}: {path} has no column {', '.join(missing)} "
                f"(it has {', '.join(names)}; set `columns`)"
            )

    def _split_of(self, path: str) -> str:
        """The split by the file's name (`train-00000-of-00002.parquet`) or its folder's."""
        words = [re.split(r"[-_.]", posixpath.basename(path))[0], *reversed(path.split("/")[:-1])]
        return next((SPLITS[word.lower()] for word in words if word.lower() in SPLITS), self.config.split)


def _has_path(schema: Any, column: str) -> bool:
    kind = schema.field(column).type
    return any(kind.field(i).name == "path" for i in range(kind.num_fields))


def _bytes(cell: Any, column: str) -> bytes | None:
    """The bytes of a cell, plain or in Hugging Face's struct. Raises ImageError."""
    if isinstance(cell, dict):
        if cell.get("bytes") is None and cell.get("path"):
            raise ImageError(f"the row has only a path ({cell['path']}), not the bytes: embed them in the table")
        cell = cell.get("bytes")
    if cell is not None and not isinstance(cell, bytes):
        raise ImageError(f"column {column} holds {type(cell).__name__}, expected bytes or a struct of bytes and path")
    return cell


def _class_names(schema: Any, label: str | None) -> list[str] | None:
    """The names that Hugging Face keeps in a schema's metadata; None without them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names]
