"""Where photographs come from: a folder of identities, InsightFace's RecordIO, webdataset shards, parquet files, zip
archives, LMDB, a data set of `generate_dataset` or a cache of `prepare_faces`."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ..files import CARD, COMPRESSED, local_path, printable, same_name, why_unreadable
from .face_cache import FaceCacheSource
from .folders import FlatFolderSource, FolderSource
from .image_folder import GENERATION, JOURNAL, METADATA
from .lmdb_set import LmdbSource, beside_database, find_databases
from .parquet_set import ParquetSource, find_parquet
from .photographs import (
    HIDDEN,
    OUTSIDE,
    Photograph,
    PhotographSource,
    describe_left_out,
    has_image_suffix,
    is_system_entry,
    source_fingerprint,
    summarize_left_out,
    unreadable_reason,
)
from .record_list import find_list, record_identities
from .recordio import RecordReader
from .webdataset import WebDatasetSource
from .zip_set import ZipSource

__all__ = [
    "FlatFolderSource",
    "FolderSource",
    "LmdbSource",
    "ParquetSource",
    "Photograph",
    "PhotographSource",
    "RecordIOSource",
    "WebDatasetSource",
    "ZipSource",
    "describe_left_out",
    "has_image_suffix",
    "is_system_entry",
    "open_faces",
    "open_source",
    "source_fingerprint",
    "summarize_left_out",
    "unreadable_reason",
]

# beside the images of a generated set
GENERATED = (GENERATION, METADATA, JOURNAL, "identities.safetensors", "preview.png")
COMPRESSED_TARS = (".tgz", *(f".tar{suffix}" for suffix in COMPRESSED))


class RecordIOSource(PhotographSource):
    """RecordIO of InsightFace, im2rec or DCFace: the identity is the (first) label, or by the list beside the file
    (see `record_identities`); the file is the key.

    Raises:
        ValueError: the index does not fit the file, or nothing tells the identities.
    """

    def __init__(self, path: Path):
        self.reader = RecordReader(path)
        labels, missing = self.reader.scan()
        self.left_out = {f"byte {offset}": f"not in {self.reader.index.name}" for offset in missing}
        keys = self.reader.image_keys()
        self.left_out |= {f"key {key}": "a record without a picture" for key in keys if key not in labels}
        labels = {key: labels[key] for key in keys if key in labels}
        # InsightFace's files have a record of each identity behind the pictures
        one = len(self.reader.keys) - len(keys) == 2 or len({*labels.values(), *missing.values()}) > 1
        identities, not_used = record_identities(self.reader.path, labels, one) if labels else ({}, {})
        self.left_out |= not_used
        self.photographs = [Photograph(identity, str(key)) for key, identity in identities.items()]

    def content(self, photograph: Photograph) -> bytes:
        return self.reader.read_image(int(photograph.file)).content

    def stamp(self, photograph: Photograph) -> str:
        return str(self.reader.read_length(int(photograph.file)))


def _open_generated(path: Path) -> PhotographSource:
    """The images or shards in a folder of `generate_dataset`."""
    if (path / JOURNAL).exists() or not (path / METADATA).exists():
        raise ValueError(
            f"{path} is an unfinished data set: go on with `uiface generate`, or give {path / 'images'} to use what"
            " there is."
        )
    if (path / "shards").is_dir():
        source: PhotographSource = WebDatasetSource(find_shards(path / "shards"))
        # the class file has a number; the key `IDENTITY/NNNN` has the name
        keys = [PurePosixPath(photograph.file.partition(":")[2]) for photograph in source.photographs]
        source.photographs = [
            photograph._replace(identity=key.parent.name)
            for photograph, key in zip(source.photographs, keys, strict=True)
        ]
    elif (path / "data").is_dir():
        source = ParquetSource(find_parquet(path / "data"))
    else:
        source = FolderSource(path / "images")
    try:
        expected = pq.read_metadata(path / METADATA).num_rows
    except pa.ArrowException as error:
        raise ValueError(f"no parquet file: {why_unreadable(path / METADATA, error)}. Restore it.") from error
    images = next((name for name in ("shards", "data") if (path / name).is_dir()), "images")
    used = [path / name for name in (*GENERATED, images)]
    _leave_out_beside(source, path, used, "the generated images")
    found = len(source.photographs)
    if found != expected:
        raise ValueError(
            f"{path} has {found} images, its {METADATA} says {expected}: it is not whole. Copy it again, or run the"
            " same `uiface generate` on it, which makes what is missing."
        )
    return source


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not is_system_entry(entry.name))


def _picture_in_folders(path: Path) -> Path | None:
    """A picture in the folders at a path, at any depth; `None` if there is none, or the path is no folder."""
    for entry in _visible(path) if path.is_dir() else []:
        for parent, folders, names in os.walk(entry):  # of a file, nothing
            folders[:] = sorted(name for name in folders if not is_system_entry(name))
            found = [name for name in names if has_image_suffix(name) and not is_system_entry(name)]
            if found:
                return Path(parent, min(found))
    return None


def find_shards(path: Path) -> list[Path]:
    """The tar shards at a path: it is one, or a folder of them.

    Raises:
        ValueError: all are compressed, and there are no folders of pictures, which they may have been unpacked to.
    """
    files = _visible(path) if path.is_dir() else [path]
    shards = [file for file in files if file.suffix.lower() == ".tar" and file.is_file()]
    compressed = [file for file in files if file.name.lower().endswith(COMPRESSED_TARS) and file.is_file()]
    if compressed and not shards and _picture_in_folders(path) is None:
        raise ValueError(f"{compressed[0]} is compressed: pictures could not be read at their places. Unpack it.")
    return shards


def find_archives(path: Path) -> list[Path]:
    """The zip archives at a path: it is one, or a folder of them. None beside folders of pictures: it is what these
    were unpacked from."""
    files = _visible(path) if path.is_dir() else [path]
    archives = [file for file in files if file.suffix.lower() == ".zip" and file.is_file()]
    return archives if _picture_in_folders(path) is None else []


class Form(NamedTuple):
    """Files that are read at their places.

    Args:
        find: the files of the form at a path; empty if there are none.
        open: the photographs in them; takes `nested`, too, see `open_source`.
        files: what they are called.
    """

    find: Callable[[Path], list[Path]]
    open: Callable[[list[Path], bool], PhotographSource]
    files: str


# a new form is a module with its source, and a line; the first that a folder has is read
FORMS = (
    Form(find_shards, lambda files, nested: WebDatasetSource(files), "the tar shards"),
    Form(find_parquet, lambda files, nested: ParquetSource(files), "the parquet files"),
    Form(find_databases, lambda files, nested: LmdbSource(files[0]), "the LMDB file"),
    Form(find_archives, ZipSource, "the zip archives"),
)


def find_records(path: Path) -> Path | None:
    """The `.rec` file at a path: it is one, or a folder with `train.rec` or with a single one.

    Raises:
        ValueError: a folder has several, none of which is `train.rec`.
    """
    if path.suffix == ".rec" and not path.is_dir():
        return path
    if not path.is_dir():
        return None
    if (path / "train.rec").exists():
        return path / "train.rec"
    found = [entry for entry in _visible(path) if entry.suffix == ".rec"]
    if len(found) > 1:
        raise ValueError(f"{path} has {len(found)} .rec files, {', '.join(file.name for file in found)}: name one.")
    return found[0] if found else None


def _check_no_folders_beside(folder: Path, files: list[Path]) -> None:
    """Of a folder with record files or shards.

    Raises:
        ValueError: it has folders with pictures, too: what is meant is not clear.
    """
    picture = _picture_in_folders(folder)
    if picture is not None:
        more = f" and {len(files) - 1} others" if len(files) > 1 else ""
        example = printable(picture.relative_to(folder).as_posix())
        raise ValueError(
            f"{folder} has {files[0].name}{more}, and pictures in folders, such as {example}: only one of these can be"
            f" meant. Give {files[0]}, or move the files or the folders to another place."
        )


def _leave_out_beside(source: PhotographSource, folder: Path, used: Iterable[Path | None], what: str) -> None:
    """What lies in a folder of which only some files are read, and in the folders that these are in. The set's card
    is no part of what is lost."""
    there = {folder / CARD, *(file for file in used if file is not None)}
    around = {folder, *(parent for file in there for parent in file.parents if parent.is_relative_to(folder))}
    for entry in sorted(entry for inner in around for entry in inner.iterdir()):
        if entry not in there and entry not in around:
            system = is_system_entry(entry.name)
            name = printable(entry.relative_to(folder).as_posix())
            source.left_out[name] = HIDDEN if system else f"beside {what}"


def _open_form(path: Path, nested: bool) -> PhotographSource:
    """The photographs in whatever form is at a path."""
    if not path.exists():
        raise ValueError(f"{path} has no photographs: it does not exist.")
    if (path / GENERATION).is_file():
        return _open_generated(path)
    if (path / "prepare.json").is_file():
        return FaceCacheSource(path)
    records = find_records(path)
    if records is not None:
        if path.is_dir():
            _check_no_folders_beside(path, [records])
        beside = records.with_suffix(".idx").exists() or find_list(records) is not None
        # index and list lie beside the file itself, if they do not beside a link to it
        source: PhotographSource = RecordIOSource(records if beside or not records.is_symlink() else records.resolve())
        if path.is_dir():
            used = (records, records.with_suffix(".idx"), find_list(records))
            _leave_out_beside(source, path, used, records.name)
        return source
    for form in FORMS:
        files = form.find(path)
        if files:
            if path.is_dir():
                _check_no_folders_beside(path, files)
            source = form.open(files, nested)
            if path.is_dir():
                _leave_out_beside(source, path, [*files, *beside_database(files[0])], form.files)
            return source
    return FolderSource(path, nested)


def _unite_spellings(source: PhotographSource) -> None:
    """People whose names differ only in their Unicode normal form are one."""
    names = dict.fromkeys(photograph.identity for photograph in source.photographs)
    spellings: dict[str, str] = {}
    for name in names:
        spellings.setdefault(same_name(name), name)
    if len(spellings) < len(names):
        source.photographs = [
            photograph._replace(identity=spellings[same_name(photograph.identity)])
            for photograph in source.photographs
        ]


def open_source(
    path: str | os.PathLike, identities: list[str] | None = None, min_images: int = 1, nested: bool = False
) -> PhotographSource:
    """Opens photographs by what is found at `path`.

    Args:
        path: a folder `ROOT/IDENTITY/*.jpg`; a `.rec` file, or a folder with `train.rec` or a single other one; a
            `.tar` shard, a parquet file or a zip archive, or a folder of them; an LMDB file or folder; a folder of
            `generate_dataset` or a cache of `prepare_faces`. It is taken literally but for a `~` at its start.
        identities: only these; all if not given. Names match in any Unicode normal form.
        min_images: identities with fewer photographs are left out.
        nested: for a folder, see `FolderSource`.

    Returns:
        The photographs that are taken; `left_out` of it names everything else that was found, with the reason.

    Raises:
        ValueError: there are no photographs, it is not clear which folders are identities, an identity that was asked
            for is not there, or the data set or cache is not finished.
    """
    path = local_path(path)
    source = _open_form(path, nested)
    _unite_spellings(source)
    counts = Counter(photograph.identity for photograph in source.photographs)
    if identities is not None:
        wanted = {same_name(name): name for name in identities}
        there = {same_name(name) for name in counts}
        missing = sorted(name for key, name in wanted.items() if key not in there)
        if missing:
            raise ValueError(f"{len(missing)} identities have no photographs in {path}, such as `{missing[0]}`.")
        asked_for = {name for name in counts if same_name(name) in wanted}
        _keep(source, asked_for, "of an identity that was not asked for")
    enough = {name for name, count in counts.items() if count >= min_images}
    _keep(source, enough, f"of an identity with fewer than {min_images} photographs")
    if not source.photographs:
        found = "; ".join(describe_left_out(summarize_left_out(source.left_out)))
        flat = any(reason == OUTSIDE and has_image_suffix(name) for name, reason in source.left_out.items())
        raise ValueError(
            f"{path} has no photographs: neither IDENTITY/FILE with a picture's suffix, nor a .rec file, nor tar"
            " shards, parquet files with pictures, an LMDB file or zip archives"
            + (f", with at least {min_images} of an identity." if min_images > 1 else ".")
            + (f" It has {found}." if found else "")
            + (f" Are its pictures of one identity? Then give {path.parent}." if flat else "")
        )
    return source


def _keep(source: PhotographSource, identities: set[str], reason: str) -> None:
    others = [photograph for photograph in source.photographs if photograph.identity not in identities]
    if others:
        source.left_out |= {photograph.file: reason for photograph in others}
        source.photographs = [photograph for photograph in source.photographs if photograph.identity in identities]


def open_faces(path: str | os.PathLike) -> PhotographSource:
    """Opens real faces in any form that `open_source` takes, or a folder that has only pictures: each then shows a
    person of its own.

    Raises:
        ValueError: as `open_source`.
    """
    folder = local_path(path)
    if folder.is_dir():
        entries = _visible(folder)
        holds_a_set = any(entry.is_dir() or entry.suffix == ".rec" for entry in entries)
        holds_a_set = holds_a_set or any(form.find(folder) for form in FORMS)
        if not holds_a_set and any(has_image_suffix(entry.name) for entry in entries):
            return FlatFolderSource(folder)
    return open_source(path)
