"""Photographs in webdataset's tar shards."""

import tarfile
from itertools import count
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from ..files import printable, why_unreadable
from .photographs import HIDDEN, NO_PICTURE, Photograph, PhotographSource, has_image_suffix, is_system_entry

REPLACED = "replaced by a later file of the same name"


class WebDatasetSource(PhotographSource):
    """Tar shards of samples `KEY.jpg`; the identity is the text of `KEY.cls` or, without one, the folder in the key.
    Where classes and folders group the pictures in the same way, the folders' names are the identities'.

    A picture's key ends where its suffix begins. If there is no `KEY.cls`, the one of a shorter key counts that ends
    at a dot of the name: `0001.cls` is of `0001.left.jpg`, too.

    Raises:
        ValueError: a shard is no tar file, or a sample has no identity.
    """

    def __init__(self, shards: list[Path]):
        self.shards, self.photographs, self.left_out = shards, [], {}
        self.members: dict[str, tuple[Path, int, int]] = {}
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
    content = tar.extractfile(member)
    try:
        return "" if content is None else content.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{printable(member.name)} of {shard} is not a class file in UTF-8: {error}") from error
