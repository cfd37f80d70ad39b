"""Photographs in folders, one for each identity, or in a single folder."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ..files import CARD, printable
from ..pictures import load_photograph
from .photographs import HIDDEN, NO_PICTURE, OUTSIDE, Photograph, PhotographSource, has_image_suffix, is_system_entry

# of folders that hold identities: the people in them would become one
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "images", "imgs", "data", "dataset"}

BACK = "a link to a folder that holds this one"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def find_part(inner: Mapping[str, Collection]) -> str | None:
    """A folder that may be a part of a set instead of an identity, where all pictures are in folders within.

    Args:
        inner: folder -> the folders within that have pictures.
    """
    several = [name for name, folders in inner.items() if len(folders) > 1]
    return next(iter(several or inner), None) if several or all(name.lower() in PARTS for name in inner) else None


class FolderSource(PhotographSource):
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
            elif entry.name != CARD:
                self._leave_out(Path(entry.path), HIDDEN if is_system_entry(entry.name) else OUTSIDE)
        direct = {photo.identity for photo in self.photographs if photo.file.count("/") == 1}
        if not nested:
            self._check_not_around(direct, inner)
        name = None if direct or nested else find_part(inner)
        if name is not None:
            example = printable(min(inner[name]).relative_to(root).as_posix())
            raise ValueError(
                f"{root} has no pictures directly in its folders, but in folders within them, such as {example}. If"
                f" that is PART/PERSON, give {printable(str(root / name))}. If it is PERSON/VIDEO, run `uiface convert"
                f" {printable(str(root))} OUTPUT --format imagefolder --nested` and give OUTPUT: all pictures in"
                f" {printable(name)} are then of one person."
            )

    def _check_not_around(self, direct: Collection[str], inner: Mapping[str, Collection[Path]]) -> None:
        """
        Raises:
            ValueError: the only folder has pictures and several folders with pictures, which may be the identities.
        """
        names = {photograph.identity for photograph in self.photographs}
        if len(names) > 1 or not direct or len(inner) != 1:
            return
        ((name, deeper),) = inner.items()
        within = {path.relative_to(self.root).parts[1] for path in deeper}
        if len(within) > 1:
            example = printable(min(deeper).relative_to(self.root).as_posix())
            raise ValueError(
                f"{self.root} has one folder, {printable(name)}, with pictures in it and in {len(within)} folders"
                f" within, such as {example}. If these are the identities, give {printable(str(self.root / name))}. If"
                f" {printable(name)} is a person, run `uiface convert {printable(str(self.root))} OUTPUT --format"
                f" imagefolder --nested` and give OUTPUT."
            )

    @staticmethod
    def _entries(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
        with os.scandir(os.fspath(folder)) as entries:
            return sorted(entries, key=lambda entry: entry.name)

    def _leave_out(self, path: Path, reason: str) -> None:
        self.left_out[printable(path.relative_to(self.root).as_posix())] = reason

    def _leave_out_all(self, folder: os.DirEntry[str], reason: str) -> None:
        """Every file in a folder, so that the counts are of files; the folder itself if it is empty."""
        found = [Path(parent, file) for parent, _, files in os.walk(folder.path) for file in files]
        for path in sorted(found) or [Path(folder.path)]:
            self._leave_out(path, reason)

    def _pictures(self, folder: os.DirEntry[str]) -> Iterator[Path]:
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
