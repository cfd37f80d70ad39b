"""A list of photographs in a text file, as a source."""

import csv
import os
from pathlib import Path, PurePosixPath

from ..files import iterate_lines, local_path
from .folders import FolderSource
from .photographs import Photograph, PhotographSource
from .sources import open_source

LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".lst")


def split_line(line: str) -> list[str]:
    """The words of a line: between tabs, or commas where it has no tab. Blanks belong to the words."""
    words = line.split("\t") if "\t" in line else next(csv.reader([line]), [])
    return [word.strip() for word in words]


class FileListSource(FolderSource):
    """The photographs of a list: one `FILE` or `FILE,IDENTITY` per line, with a comma or a tab. Without an identity it
    is the name of the file's folder. Paths begin in the list's folder.

    Args:
        path: the list.

    Raises:
        ValueError: a line is of another form, a file is missing, or is listed with two identities.
    """

    def __init__(self, path: Path):
        self.root, self.photographs, self.left_out, self._paths = path.parent, [], {}, {}
        identities: dict[str, str] = {}
        missing: list[str] = []
        for number, line in enumerate(iterate_lines(path), start=1):
            if not line.strip():
                continue
            words = split_line(line)
            file, identity = words[0], words[1] if len(words) > 1 else PurePosixPath(words[0]).parent.name
            if len(words) > 2 or not file or not identity:
                raise ValueError(f"{path}, line {number}, is {line!r}: neither FILE,IDENTITY nor FOLDER/FILE.")
            if file in identities:
                if identities[file] != identity:
                    raise ValueError(
                        f"{path}, line {number}, says that {file} is of `{identity}`, an earlier line that it is of"
                        f" `{identities[file]}`."
                    )
                self.left_out[f"{file} (line {number})"] = "listed twice"
                continue
            identities[file] = identity
            if not (self.root / file).is_file():
                missing.append(file)
            self.photographs.append(Photograph(identity, file))
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(identities)} files of {path} are missing, such as {self.root / missing[0]}:"
                " paths begin in the list's folder."
            )
        if not self.photographs:
            raise ValueError(f"{path} lists no files.")


def open_source_or_list(path: str | os.PathLike) -> PhotographSource:
    """Opens what `open_source` opens, or a list of files (`.txt`, `.csv`, `.tsv`, `.lst`), see `FileListSource`.

    Raises:
        ValueError: as of the two.
    """
    path = local_path(path)
    is_list = path.suffix.lower() in LIST_SUFFIXES and path.is_file()
    return FileListSource(path) if is_list else open_source(path)
