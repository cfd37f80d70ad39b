"""Where photographs come from: a folder of identities, InsightFace's RecordIO, webdataset shards, a data set of
`generate_dataset` or a cache of `prepare_faces`."""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ..faces import load_photograph
from ..files import LFS_POINTER, local_path, printable, same_name, why_unreadable
from .image_folder import GENERATION, JOURNAL, METADATA
from .record_list import find_list, record_identities
from .recordio import RecordReader

# formats that Pillow only names, hands to another program, or takes from containers that hold no photographs
NO_PHOTOGRAPHS = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")


def _image_suffixes() -> frozenset[str]:
    suffixes = PIL.Image.registered_extensions().items()
    # MPO, of cameras with two lenses, is opened as the JPEG that it starts with
    readable = {*PIL.Image.OPEN, "MPO"} - {*NO_PHOTOGRAPHS}
    return frozenset(end for end, name in suffixes if name in readable)


IMAGE_SUFFIXES = _image_suffixes()
# left behind by systems and tools; names with a dot in front are hidden anyway
SYSTEM_NAMES = {"__macosx", "__pycache__", "thumbs.db", "desktop.ini", "@eadir", "#recycle", "#snapshot"}
SYSTEM_NAMES |= {"$recycle.bin", "system volume information", "lost+found"}
# of folders that hold identities: the people in them would become one
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "images", "imgs", "data", "dataset"}

# beside the images of a generated set
GENERATED = (GENERATION, METADATA, JOURNAL, "identities.safetensors", "preview.png", "README.md")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

HIDDEN = "hidden or system file"
NO_PICTURE = "not an image by its suffix"
OUTSIDE = "in no identity's folder"
BACK = "a link to a folder that holds this one"
REPLACED = "replaced by a later file of the same name"
NAMED = 10  # of what was left out, by each reason


class Photograph(NamedTuple):
    """Its identity, and the name by which the source finds it."""

    identity: str
    file: str


class PhotographSource(Protocol):
    """Photographs in an order that does not change, each to be read at any time.

    `left_out` has what was found beside them: name -> why it is not among them.
    """

    photographs: list[Photograph]
    left_out: dict[str, str]

    def read(self, photograph: Photograph) -> np.ndarray:
        """`(height, width, 3)` RGB bytes.

        Raises:
            OSError: it cannot be read.
        """

    def content(self, photograph: Photograph) -> bytes:
        """Its file, not decoded.

        Raises:
            OSError: it is missing or damaged.
        """

    def stamp(self, photograph: Photograph) -> str:
        """Another one after the photograph was changed, as its size in bytes; without reading it."""


def source_fingerprint(
    source: PhotographSource, photographs: Sequence[Photograph] | None = None, progress: bool = False
) -> str:
    """64 hexadecimal digits: other photographs, other identities or other sizes of files, another fingerprint.

    Args:
        source: of the photographs.
        photographs (*optional*): only these; all if not given.
        progress: shows it.
    """
    photographs = source.photographs if photographs is None else photographs
    stamping = tqdm(photographs, unit="photo", desc="sizes", disable=not progress)
    stamps = [[*photograph, source.stamp(photograph)] for photograph in stamping]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def summarize_left_out(left_out: Mapping[str, str]) -> dict[str, dict]:
    """Reason -> `count` of what was left out for it, and the `first` ten names."""
    summary: dict[str, dict] = {}
    for name, reason in left_out.items():
        entry = summary.setdefault(reason, {"count": 0, "first": []})
        entry["count"] += 1
        if len(entry["first"]) < NAMED:
            entry["first"].append(name)
    return summary


def describe_left_out(summary: Mapping[str, dict]) -> list[str]:
    """One line for each reason of `summarize_left_out`: `3 not an image by its suffix: anna/notes.txt, ...`."""
    lines = []
    for reason, entry in summary.items():
        more = ", ..." if entry["count"] > len(entry["first"]) else ""
        lines.append(f"{entry['count']} {reason}: {', '.join(entry['first'])}{more}")
    return lines


def unreadable_reason(source: PhotographSource, photograph: Photograph, error: OSError) -> str:
    """Why a photograph cannot be read, in words that are the same for all of a kind.

    Raises:
        OSError: the given error, where it is not of the picture but of the disk or the network.
    """
    if error.errno is not None:
        raise error
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PIL.Image.DecompressionBombError):
            return f"over Pillow's limit of {2 * PIL.Image.MAX_IMAGE_PIXELS} pixels"
        cause = cause.__cause__ or cause.__context__
    try:
        is_pointer = source.content(photograph).startswith(LFS_POINTER)
    except OSError:
        is_pointer = False
    return "a Git LFS pointer (run `git lfs pull`)" if is_pointer else "unreadable"


def is_system_entry(name: str) -> bool:
    """Whether a file or folder is hidden, or was made by an operating system or a tool."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def has_image_suffix(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


class FolderSource:
    """`ROOT/IDENTITY/*.jpg`, sorted; pictures in folders within an identity's are its own, too.

    Args:
        root: the folder.
        nested: whether each folder in ROOT is one identity where all pictures are in folders within, as in
            `ROOT/PERSON/VIDEO/*.jpg`. Without it, these are refused: they look the same as `ROOT/PART/PERSON/*.jpg`.

    Raises:
        ValueError: the folders in ROOT may be parts of a set, such as `train` and `test`, instead of identities.
    """

    def __init__(self, root: Path, nested: bool = False):
        self.root, self.photographs, self.left_out = root, [], {}
        # of names that are not UTF-8: what is shown in their place -> the path
        self._paths: dict[str, Path] = {}
        above = {root.resolve(), *root.resolve().parents}
        inner: dict[str, set[Path]] = {}
        for entry in self._entries(root) if root.is_dir() else []:
            if entry.is_symlink() and Path(os.path.realpath(entry.path)) in above:
                self._leave_out(Path(entry.path), BACK)
            elif _is_folder(entry):
                files = sorted(self._pictures(entry), key=lambda path: path.relative_to(root).parts)
                deeper = {path.parent for path in files if path.parent.parent != root}
                inner |= {entry.name: deeper} if deeper else {}
                self._add(entry.name, files)
            else:
                self._leave_out(Path(entry.path), HIDDEN if is_system_entry(entry.name) else OUTSIDE)
        direct = {photo.identity for photo in self.photographs if photo.file.count("/") == 1}
        several = [name for name, folders in inner.items() if len(folders) > 1]
        if inner and not (direct or nested) and (several or all(name.lower() in PARTS for name in inner)):
            name = (several or list(inner))[0]
            example = printable(min(inner[name]).relative_to(root).as_posix())
            raise ValueError(
                f"{root} has no pictures directly in its folders, but in folders within them, such as {example}. If"
                f" that is PART/PERSON, give {printable(str(root / name))}. If it is PERSON/VIDEO, run `uiface convert"
                f" {printable(str(root))} OUTPUT --format imagefolder --nested` and give OUTPUT: all pictures in"
                f" {printable(name)} are then of one person."
            )

    @staticmethod
    def _entries(folder: os.PathLike) -> list[os.DirEntry]:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)

    def _leave_out(self, path: Path, reason: str) -> None:
        self.left_out[printable(path.relative_to(self.root).as_posix())] = reason

    def _leave_out_all(self, folder: os.DirEntry, reason: str) -> None:
        """Every file in a folder, so that the counts are of files; the folder itself if it is empty."""
        found = [Path(parent, file) for parent, _, files in os.walk(folder) for file in files]
        for path in sorted(found) or [Path(folder.path)]:
            self._leave_out(path, reason)

    def _pictures(self, folder: os.DirEntry) -> Iterator[Path]:
        if is_system_entry(folder.name):
            self._leave_out_all(folder, HIDDEN)
            return
        entries = self._entries(folder)
        if not entries:
            self._leave_out(Path(folder.path), "an empty folder")
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                yield from self._pictures(entry)
            elif _is_folder(entry):
                self._leave_out(path, "a link to a folder within an identity's")  # it may lead back here
            elif is_system_entry(entry.name):
                self._leave_out(path, HIDDEN)
            elif not entry.is_symlink() and not entry.is_file():  # a link may lead to itself
                self._leave_out(path, "not a regular file")
            elif has_image_suffix(entry.name):
                yield path
            else:
                self._leave_out(path, NO_PICTURE)

    def _add(self, identity: str, files: Iterable[Path]) -> None:
        for path in files:
            name = path.relative_to(self.root).as_posix()
            shown = printable(name)
            if shown != name:
                if shown in self._paths or os.path.lexists(self.root / shown):
                    self.left_out[shown] = "a name that is not UTF-8, and is there twice"
                    continue
                self._paths[shown] = path
            self.photographs.append(Photograph(printable(identity), shown))

    def _path(self, photograph: Photograph) -> Path:
        path = self._paths.get(photograph.file, self.root / photograph.file)
        if path.is_symlink() and not path.exists():
            raise OSError(f"{path} is a link to nothing.")
        return path

    def read(self, photograph: Photograph) -> np.ndarray:
        return load_photograph(self._path(photograph))

    def content(self, photograph: Photograph) -> bytes:
        return self._path(photograph).read_bytes()

    def stamp(self, photograph: Photograph) -> str:
        try:
            return str(self._path(photograph).stat().st_size)
        except OSError as error:
            if error.errno is not None:  # not the picture but the disk or the network
                raise
            return "missing"


class FlatFolderSource(FolderSource):
    """`ROOT/*.jpg`, sorted, without folders of identities: each picture is of an identity of its own, by its file's
    name."""

    def __init__(self, root: Path):
        self.root, self.photographs, self.left_out, self._paths = root, [], {}, {}
        for entry in self._entries(root):
            path = Path(entry.path)
            if _is_folder(entry):
                self._leave_out_all(entry, HIDDEN if is_system_entry(entry.name) else "in a folder")
            elif is_system_entry(entry.name):
                self._leave_out(path, HIDDEN)
            elif not has_image_suffix(entry.name):
                self._leave_out(path, NO_PICTURE)
            else:
                self._add(entry.name, [path])


class RecordIOSource:
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

    def read(self, photograph: Photograph) -> np.ndarray:
        return load_photograph(io.BytesIO(self.content(photograph)))

    def content(self, photograph: Photograph) -> bytes:
        return self.reader.read_image(int(photograph.file)).content

    def stamp(self, photograph: Photograph) -> str:
        return str(self.reader.read_length(int(photograph.file)))


class WebDatasetSource:
    """Tar shards of samples `KEY.jpg`; the identity is the text of `KEY.cls` or, without one, the folder in the key.
    Where classes and folders group the pictures in the same way, the folders' names are the identities'.

    A picture's key ends where its suffix begins. If there is no `KEY.cls`, the one of a shorter key counts that ends
    at a dot of the name: `0001.cls` is of `0001.left.jpg`, too.

    Raises:
        ValueError: a shard is no tar file, or a sample has no identity.
    """

    def __init__(self, shards: list[Path]):
        self.shards, self.members, self.photographs, self.left_out = shards, {}, [], {}
        folders: list[str] = []
        for shard in tqdm(shards, desc="index", unit="shard"):
            try:
                folders += self._index(shard)
            except tarfile.TarError as error:
                raise ValueError(f"{shard.name} is no tar file: {why_unreadable(shard, error)}.") from error
        classes = [photograph.identity for photograph in self.photographs]
        pairs = set(zip(classes, folders, strict=True))
        if "." not in folders and len(pairs) == len(set(classes)) == len(set(folders)):
            self.photographs = [
                photograph._replace(identity=folder)
                for photograph, folder in zip(self.photographs, folders, strict=True)
            ]

    def _index(self, shard: Path) -> list[str]:
        """Adds the pictures of a shard; returns the folder of each."""
        pictures: dict[str, tarfile.TarInfo] = {}
        classes: dict[str, str] = {}
        others: dict[str, str] = {}
        places: dict[str, tuple[Path, int, int]] = {}
        end = 0

        def leave_out(name: str, reason: str) -> None:
            number = next(number for number in count(2) if f"{name} ({number})" not in others) if name in others else 1
            others[name if number == 1 else f"{name} ({number})"] = reason

        with tarfile.open(shard, "r:") as tar:  # compressed, a picture could not be read at its offset
            for member in tar:
                name = printable(str(PurePosixPath(member.name)))
                end = member.offset_data + (-(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
                if member.isdir():
                    continue
                if member.islnk() and printable(str(PurePosixPath(member.linkname))) in places:
                    places[name] = places[printable(str(PurePosixPath(member.linkname)))]
                elif member.isfile():
                    places[name] = (shard, member.offset_data, member.size)
                else:
                    leave_out(name, "a link or a special file")
                    continue
                if any(is_system_entry(part) for part in PurePosixPath(name).parts if part not in (".", "..", "/")):
                    leave_out(name, HIDDEN)
                elif has_image_suffix(name):
                    if name in pictures:
                        leave_out(f"{name} (earlier)", REPLACED)
                    pictures[name] = member
                elif name.endswith(".cls"):
                    if name.removesuffix(".cls") in classes:
                        leave_out(f"{name} (earlier)", REPLACED)
                    classes[name.removesuffix(".cls")] = _class_text(tar, member, shard)
                else:
                    leave_out(name, NO_PICTURE)
        self._check_end(shard, end)
        keys = {key for name in pictures for key in _keys(name)}
        for key in classes:
            if key not in keys:
                leave_out(f"{key}.cls", "a class file without a picture")
        for name, reason in others.items():
            # what belongs to a picture's sample is no picture that was forgotten
            if reason != NO_PICTURE or keys.isdisjoint(_keys(name)):
                self.left_out[f"{shard.name}:{name}"] = reason
        folders = []
        for name in pictures:
            folder = str(PurePosixPath(name).parent)
            identity = next((classes[key] for key in _keys(name) if classes.get(key)), folder)
            if identity == ".":
                key = _keys(name)[0]
                raise ValueError(f"sample {key} of {shard} has neither a .cls file nor a folder for its identity.")
            photograph = Photograph(identity, f"{shard.name}:{name}")
            self.members[photograph.file] = places[name]
            self.photographs.append(photograph)
            folders.append(folder)
        return folders

    def _check_end(self, shard: Path, end: int) -> None:
        """Python takes a damaged header for the end of the archive: behind that there are only zeros."""
        with open(shard, "rb") as file:
            file.seek(end)
            marked = bool(start := file.read(tarfile.BLOCKSIZE))
            while start:
                if start.strip(b"\0"):
                    raise ValueError(
                        f"{shard} goes on behind its end at byte {end}: it is damaged there, or several shards were"
                        " joined. Copy it again, or give the shards one by one."
                    )
                start = file.read(1 << 20)
        if not marked:
            self.left_out[shard.name] = "without a tar file's end: it may be cut short"

    def read(self, photograph: Photograph) -> np.ndarray:
        return load_photograph(io.BytesIO(self.content(photograph)))

    def content(self, photograph: Photograph) -> bytes:
        shard, offset, size = self.members[photograph.file]
        with open(shard, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def stamp(self, photograph: Photograph) -> str:
        return str(self.members[photograph.file][2])


def _keys(name: str) -> list[str]:
    """The keys that a tar member may have, the longest first: its name without suffix, then cut at each dot."""
    path = PurePosixPath(name)
    words = path.name.split(".")
    return [str(path.with_name(".".join(words[:end]))) for end in range(len(words) - 1, 0, -1) if words[0]]


def _class_text(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> str:
    try:
        return tar.extractfile(member).read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{printable(member.name)} of {shard} is not a class file in UTF-8: {error}") from error


def _open_generated(path: Path) -> PhotographSource:
    """The images or shards in a folder of `generate_dataset`."""
    if (path / JOURNAL).exists() or not (path / METADATA).exists():
        raise ValueError(
            f"{path} is an unfinished data set: go on with `uiface generate`, or give {path / 'images'} to use what"
            " there is."
        )
    if (path / "shards").is_dir():
        source = WebDatasetSource(_shards(path / "shards"))
        # the class file has a number; the key `IDENTITY/NNNN` has the name
        keys = [PurePosixPath(photograph.file.partition(":")[2]) for photograph in source.photographs]
        source.photographs = [
            photograph._replace(identity=key.parent.name)
            for photograph, key in zip(source.photographs, keys, strict=True)
        ]
    else:
        source = FolderSource(path / "images")
    try:
        expected = pq.read_metadata(path / METADATA).num_rows
    except pa.ArrowException as error:
        raise ValueError(f"no parquet file: {why_unreadable(path / METADATA, error)}. Restore it.") from error
    used = [path / name for name in (*GENERATED, "shards" if (path / "shards").is_dir() else "images")]
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


def _shards(folder: Path) -> list[Path]:
    return [entry for entry in _visible(folder) if entry.suffix.lower() == ".tar" and entry.is_file()]


def _is_compressed(path: Path) -> bool:
    return path.name.lower().endswith(COMPRESSED) and path.is_file()


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
    for entry in _visible(folder):
        if entry.is_dir():
            for parent, folders, names in os.walk(entry):
                folders[:] = sorted(name for name in folders if not is_system_entry(name))
                found = [name for name in names if has_image_suffix(name) and not is_system_entry(name)]
                if found:
                    more = f" and {len(files) - 1} others" if len(files) > 1 else ""
                    example = printable(Path(parent, min(found)).relative_to(folder).as_posix())
                    raise ValueError(
                        f"{folder} has {files[0].name}{more}, and pictures in folders, such as {example}: only one of"
                        f" these can be meant. Give {files[0]}, or move the files or the folders to another place."
                    )


def _leave_out_beside(source: PhotographSource, folder: Path, used: Iterable[Path | None], what: str) -> None:
    """What lies in a folder of which only some files are read."""
    used = set(used)
    for entry in sorted(folder.iterdir()):
        if entry not in used:
            system = is_system_entry(entry.name)
            source.left_out[printable(entry.name)] = HIDDEN if system else f"beside {what}"


def _open_form(path: Path, nested: bool) -> PhotographSource:
    """The photographs in whatever form is at a path."""
    from .face_cache import FaceCacheSource  # prepares what this module opens

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
        source = RecordIOSource(records if beside or not records.is_symlink() else records.resolve())
        if path.is_dir():
            used = (records, records.with_suffix(".idx"), find_list(records))
            _leave_out_beside(source, path, used, records.name)
        return source
    compressed = [entry for entry in (_visible(path) if path.is_dir() else [path]) if _is_compressed(entry)]
    shards = _shards(path) if path.is_dir() else [path] if path.suffix.lower() == ".tar" else []
    if compressed and not shards:
        raise ValueError(f"{compressed[0]} is compressed: pictures could not be read at their places. Unpack it.")
    if shards:
        if path.is_dir():
            _check_no_folders_beside(path, shards)
        source = WebDatasetSource(shards)
        if path.is_dir():
            _leave_out_beside(source, path, shards, "the tar shards")
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
            `.tar` shard, or a folder of them; a folder of `generate_dataset` or a cache of `prepare_faces`. It is
            taken literally but for a `~` at its start.
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
            " shards"
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
