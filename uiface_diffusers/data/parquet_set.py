"""Photographs in parquet files as data sets on the Hub have them: a column of pictures, and one that says whose."""

import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, count, islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ..files import brief, complete_file, printable, why_unreadable
from .image_folder import METADATA
from .photographs import Photograph, PhotographSource, has_image_suffix, is_system_entry

# columns that say whose picture it is: the first that is there counts
PEOPLE = ("identity", "identity_id", "person", "person_id", "subject", "subject_id")
IDENTITIES = (*PEOPLE, "label", "labels", "class", "class_id", "cls")
IMAGE = "image"
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SPLIT = re.compile(r"(?P<split>.+?)-\d+-of-\d+\.parquet", re.IGNORECASE)
WINDOW = 32  # rows of pictures in memory
INDEXED = 65536  # rows of labels
READ_AHEAD = 2**20  # bytes
ROWS_A_GROUP = 100  # that the Hub's viewer reads at a time


def find_parquet(path: Path) -> list[Path]:
    """The files with pictures at a path: it is one, or a folder with some, or with some in `data` as on the Hub. Of
    several splits, `train` is taken.

    Raises:
        ValueError: there are several splits, none of which is `train`.
    """
    if path.suffix.lower() == ".parquet" and path.is_file():
        return [path]
    if not path.is_dir():
        return []
    found = _with_pictures(path) or (_with_pictures(path / "data") if (path / "data").is_dir() else [])
    splits: dict[str, list[Path]] = {}
    for file in found:
        match = SPLIT.fullmatch(file.name)
        splits.setdefault(match["split"] if match else "", []).append(file)
    if len(splits) > 1 and "train" not in splits:
        names = ", ".join(files[0].name for files in splits.values())
        raise ValueError(f"{path} has parquet files of several splits, {names}: give the file or folder of one.")
    return splits.get("train", found)


def _with_pictures(folder: Path) -> list[Path]:
    """Parquet files that have pictures or cannot be read; all of them, if there is nothing else to be taken for the
    set, so that it can be said what they have."""
    entries = [entry for entry in sorted(folder.iterdir()) if not is_system_entry(entry.name)]
    files = [file for file in entries if file.suffix.lower() == ".parquet" and file.is_file()]
    files = [file for file in files if file.name != METADATA]
    found = []
    for file in files:
        try:
            if _picture_column(_open(file).schema_arrow) is not None:
                found.append(file)
        except (pa.ArrowException, OSError):
            found.append(file)
    others = any(entry.is_dir() or has_image_suffix(entry.name) for entry in entries)
    return found or ([] if others else files)


def _picture_column(schema: pa.Schema) -> str | None:
    """The column of pictures: `image`, or the only one of structs with `bytes`; with the field's name behind a dot."""
    columns = {}
    for field in schema:
        if pa.types.is_struct(field.type) and any(each.name == "bytes" for each in field.type):
            columns[field.name] = f"{field.name}.bytes"
        elif field.name == IMAGE and (pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)):
            columns[field.name] = field.name
    return columns.get(IMAGE) or (next(iter(columns.values())) if len(columns) == 1 else None)


class _Columns(NamedTuple):
    """Where a file has its pictures and identities, and the names of its labels if it has some."""

    picture: str
    path: str | None
    identity: str
    is_text: bool
    names: tuple[str, ...] | None


def _find_columns(file: Path, schema: pa.Schema) -> _Columns:
    picture = _picture_column(schema)
    has = f"it has {', '.join(f'{field.name} ({field.type})' for field in schema)}"
    if picture is None:
        raise ValueError(f"{file} has no column `{IMAGE}` of pictures' files (bytes, or a struct with bytes): {has}.")
    features = _features(file, schema)
    classes = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    there = [name for name in IDENTITIES if name in schema.names] or (classes if len(classes) == 1 else [])
    if not there:
        raise ValueError(f"{file} has no column that says whose pictures these are, such as `identity`: {has}.")
    identity = there[0]
    kind = schema.field(identity).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not is_text and not pa.types.is_integer(kind):
        raise ValueError(f"column `{identity}` of {file} is {kind}: identities are whole numbers or text.")
    names = features.get(identity, {}).get("names")
    names = None if is_text or not names else tuple(map(str, names))
    if names and len(set(names)) < len(names):
        raise ValueError(f"column `{identity}` of {file} has two labels of one name: identities could not be told.")
    outer, _, inner = picture.partition(".")
    has_path = bool(inner) and any(each.name == "path" for each in schema.field(outer).type)
    return _Columns(picture, f"{outer}.path" if has_path else None, identity, is_text, names)


def _features(file: Path, schema: pa.Schema) -> dict[str, dict]:
    """What `datasets` says about the columns."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in info.items() if isinstance(feature, dict)}
    except KeyError:
        return {}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"what {file} says about its columns (`huggingface`) is damaged: {brief(error)}.") from error


class _Rows:
    """The pictures of one file: a window of rows at a time, forward within a group of rows."""

    def __init__(self, file: Path, column: str):
        self.file, self.column, self.process = file, column, os.getpid()
        self.parquet = _open(file)
        groups = range(self.parquet.metadata.num_row_groups)
        self.starts = [0, *accumulate(self.parquet.metadata.row_group(group).num_rows for group in groups)]
        self.group = -1
        self.start = self.stop = 0
        self.window: list[Any] = []
        self.batches: Iterator[pa.RecordBatch] = iter(())

    def read(self, row: int) -> bytes | None:
        group = bisect_right(self.starts, row) - 1
        if group != self.group or row < self.start:
            self.group, self.start, self.stop = group, self.starts[group], self.starts[group]
            self.batches = self.parquet.iter_batches(WINDOW, [group], [self.column], use_threads=False)
        while row >= self.stop:
            values = next(self.batches).column(0)
            self.window = values.field("bytes") if pa.types.is_struct(values.type) else values
            self.start, self.stop = self.stop, self.stop + len(values)
        return self.window[row - self.start].as_py()


def _open(file: Path) -> pq.ParquetFile:
    # pyarrow's own file, as in `face_cache`; page by page: a group of rows may be larger than the memory
    return pq.ParquetFile(pa.OSFile(os.fspath(file)), buffer_size=READ_AHEAD, pre_buffer=False)


class ParquetSource(PhotographSource):
    """
    Args:
        files: of one set: their columns are the same.

    Raises:
        ValueError: a file is damaged, a column is missing or of another type, or the files do not agree.
    """

    def __init__(self, files: list[Path]):
        self.files, self.photographs, self.left_out = files, [], {}
        self._places: dict[str, tuple[int, int]] = {}
        self._columns: list[_Columns] = []
        self._rows: _Rows | None = None
        for number, file in enumerate(tqdm(files, desc="index", unit="file")):
            try:
                self._index(number, file)
            except (pa.ArrowException, OSError) as error:
                if getattr(error, "errno", None) is not None:
                    raise
                raise ValueError(f"no parquet file: {why_unreadable(file, error)}.") from error

    def __getstate__(self) -> dict:
        # for the workers of a DataLoader that are not forked
        return {**self.__dict__, "_rows": None}

    def _index(self, number: int, file: Path) -> None:
        parquet = _open(file)
        columns = _find_columns(file, parquet.schema_arrow)
        first = self._columns[0] if self._columns else columns
        if (columns.identity, columns.is_text, columns.names) != (first.identity, first.is_text, first.names):
            raise ValueError(
                f"column `{first.identity}` of {self.files[0].name} and `{columns.identity}` of {file.name} are of"
                " different types or have different names of labels: identities could not be told."
            )
        self._columns.append(columns)
        wanted = [columns.identity, *filter(None, [columns.path])]
        rows = count()
        for batch in parquet.iter_batches(INDEXED, columns=wanted, use_threads=False):
            table = pa.Table.from_batches([batch])
            labels = table[columns.identity].to_pylist()
            paths = table[columns.path.partition(".")[0]].to_pylist() if columns.path else [None] * len(labels)
            for label, path in zip(labels, paths, strict=True):
                self._add(number, next(rows), label, path and path["path"])

    def _add(self, number: int, row: int, label: int | str | None, path: str | None) -> None:
        columns = self._columns[number]
        # the picture's name, as far as it is one
        name = PurePosixPath(path).name if path else ""
        file = f"{self.files[number].name}:{f'{row}:{name}' if name else f'{row:07d}'}"
        names = columns.names
        if label is None or label == "" or isinstance(label, int) and label < 0:
            self.left_out[file] = "without an identity"
        elif names is not None and int(label) >= len(names):
            self.left_out[file] = "a label without a name"
        else:
            identity = label if isinstance(label, str) else names[label] if names else f"{label:07d}"
            self._places[file] = number, row
            self.photographs.append(Photograph(printable(identity), file))

    def content(self, photograph: Photograph) -> bytes:
        number, row = self._places[photograph.file]
        file = self.files[number]
        try:
            if self._rows is None or self._rows.file != file or self._rows.process != os.getpid():
                self._rows = _Rows(file, self._columns[number].picture)
            content = self._rows.read(row)
        except (pa.ArrowException, OSError, StopIteration) as error:
            self._rows = None
            if getattr(error, "errno", None) is not None:
                raise
            raise OSError(f"row {row} of {file} cannot be read: {brief(error)}.") from error
        if content is None:
            raise OSError(f"row {row} of {file} has no picture's bytes.")
        return content

    def stamp(self, photograph: Photograph) -> str:
        # the file's: a picture's own would have to be read
        return str(self.files[self._places[photograph.file][0]].stat().st_size)


def hub_schema(columns: Mapping[str, pa.DataType]) -> pa.Schema:
    """`image` and further columns, with what `datasets` and the Hub's viewer need to show the pictures."""
    features: dict[str, dict] = {IMAGE: {"_type": "Image"}}
    features |= {name: {"dtype": _dtype(kind), "_type": "Value"} for name, kind in columns.items()}
    described = json.dumps({"info": {"features": features}})
    return pa.schema([(IMAGE, PICTURE), *columns.items()], {"huggingface": described})


def _dtype(kind: pa.DataType) -> str:
    return {"float": "float32", "double": "float64"}.get(str(kind), str(kind))


def write_parquet(file: Path, schema: pa.Schema, rows: Iterable[Mapping[str, Any]]) -> None:
    """A file that is complete or not there at all.

    Args:
        file: its folder is made.
        schema: of `hub_schema`.
        rows: `image` is `{"bytes": ..., "path": ...}`.
    """
    with complete_file(file) as beside, pq.ParquetWriter(beside, schema) as writer:
        remaining = iter(rows)
        while group := list(islice(remaining, ROWS_A_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema))
