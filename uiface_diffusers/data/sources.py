"""Where photographs come from: a folder of identities, InsightFace's RecordIO, webdataset shards, a data set of
`generate_dataset` or a cache of `prepare_faces`."""

import io
import os
import tarfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ..faces import load_photograph
from .image_folder import GENERATION, JOURNAL, METADATA
from .recordio import RecordReader

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class Photograph(NamedTuple):
    """Its identity, and the name by which the source finds it."""

    identity: str
    file: str


class PhotographSource(Protocol):
    """Photographs in an order that does not change, each to be read at any time."""

    photographs: list[Photograph]

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


class FolderSource:
    """`ROOT/IDENTITY/*.jpg`, sorted."""

    def __init__(self, root: Path):
        self.root = root
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
        self.photographs = [
            Photograph(folder.name, f"{folder.name}/{name}")
            for folder in folders
            for name in sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())
            if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
        ]

    def _path(self, photograph: Photograph) -> Path:
        path = self.root / photograph.file
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


class RecordIOSource:
    """InsightFace's `train.rec` and `train.idx`: the identity is the (first) label, the file is the key."""

    def __init__(self, path: Path):
        self.reader = RecordReader(path)
        self.photographs = []
        for key in tqdm(self.reader.image_keys(), desc="labels", unit="record"):
            self.photographs.append(Photograph(f"{int(self.reader.read_label(key)):07d}", str(key)))

    def read(self, photograph: Photograph) -> np.ndarray:
        return load_photograph(io.BytesIO(self.content(photograph)))

    def content(self, photograph: Photograph) -> bytes:
        return self.reader.read_image(int(photograph.file)).content

    def stamp(self, photograph: Photograph) -> str:
        return str(self.reader.read_length(int(photograph.file)))


class WebDatasetSource:
    """Tar shards of samples `KEY.jpg`; the identity is the text of `KEY.cls` or, without one, the folder in the key.

    Raises:
        ValueError: a shard is no tar file, or a sample has no identity.
    """

    def __init__(self, shards: list[Path]):
        self.shards, self.members, self.photographs = shards, {}, []
        for shard in tqdm(shards, desc="index", unit="shard"):
            try:
                self._index(shard)
            except tarfile.TarError as error:
                raise ValueError(f"{shard} is no tar file, or a part of one: {error}") from error

    def _index(self, shard: Path) -> None:
        pictures, classes = {}, {}
        with tarfile.open(shard, "r:") as tar:  # compressed, a picture could not be read at its offset
            for member in filter(tarfile.TarInfo.isfile, tar):
                # a sample's key ends at the first dot of the file's name
                path = PurePosixPath(member.name)
                stem, _, suffix = path.name.partition(".")
                key = str(path.with_name(stem)) if stem else member.name
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    pictures[key] = member
                elif suffix == "cls":
                    classes[key] = tar.extractfile(member).read().decode().strip()
        for key, member in pictures.items():
            identity = classes.get(key) or str(PurePosixPath(key).parent)
            if identity == ".":
                raise ValueError(f"sample {key} of {shard} has neither a .cls file nor a folder for its identity.")
            photograph = Photograph(identity, f"{shard.name}:{member.name}")
            self.members[photograph.file] = (shard, member.offset_data, member.size)
            self.photographs.append(photograph)

    def read(self, photograph: Photograph) -> np.ndarray:
        return load_photograph(io.BytesIO(self.content(photograph)))

    def content(self, photograph: Photograph) -> bytes:
        shard, offset, size = self.members[photograph.file]
        with open(shard, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def stamp(self, photograph: Photograph) -> str:
        return str(self.members[photograph.file][2])


def _open_generated(path: Path) -> PhotographSource:
    """The images or shards in a folder of `generate_dataset`."""
    if (path / JOURNAL).exists() or not (path / METADATA).exists():
        raise ValueError(
            f"{path} is an unfinished data set: go on with `uiface generate`, or give {path / 'images'} to use what"
            " there is."
        )
    if (path / "shards").is_dir():
        source = WebDatasetSource(sorted((path / "shards").glob("*.tar")))
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
        raise ValueError(f"{path / METADATA} is damaged: restore it. ({error})") from error
    found = len(source.photographs)
    if found != expected:
        raise ValueError(
            f"{path} has {found} images, its {METADATA} says {expected}: it is not whole. Copy it again, or run the"
            " same `uiface generate` on it, which makes what is missing."
        )
    return source


def open_source(path: str | os.PathLike, identities: list[str] | None = None, min_images: int = 1) -> PhotographSource:
    """Opens photographs by what is found at `path`.

    Args:
        path: a folder `ROOT/IDENTITY/*.jpg`; a `.rec` file, or a folder with `train.rec`; a `.tar` shard, or a folder
            of them; a folder of `generate_dataset` or a cache of `prepare_faces`.
        identities: only these; all if not given.
        min_images: identities with fewer photographs are left out.

    Raises:
        ValueError: there are no photographs, an identity that was asked for is not there, or the data set or cache is
            not finished.
    """
    from .face_cache import FaceCacheSource  # prepares what this module opens

    path = Path(path)
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [path] if path.suffix == ".tar" else []
    if (path / GENERATION).is_file():
        source = _open_generated(path)
    elif (path / "prepare.json").is_file():
        source = FaceCacheSource(path)
    elif path.suffix == ".rec" or (path / "train.rec").exists():
        source = RecordIOSource(path if path.suffix == ".rec" else path / "train.rec")
    elif shards:
        source = WebDatasetSource(shards)
    else:
        source = FolderSource(path)
    counts = Counter(photograph.identity for photograph in source.photographs)
    if identities is not None:
        missing = sorted(set(identities) - counts.keys())
        if missing:
            raise ValueError(f"{len(missing)} identities have no photographs in {path}, as `{missing[0]}`.")
        wanted = set(identities)
        source.photographs = [photograph for photograph in source.photographs if photograph.identity in wanted]
    source.photographs = [photo for photo in source.photographs if counts[photo.identity] >= min_images]
    if not source.photographs:
        raise ValueError(
            f"{path} has no photographs: neither IDENTITY/FILE with a suffix of {', '.join(IMAGE_SUFFIXES)}, nor"
            " train.rec, nor tar shards" + (f", with at least {min_images} of an identity." if min_images > 1 else ".")
        )
    return source
