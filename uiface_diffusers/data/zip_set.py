"""Photographs in zip archives of a folder tree."""

import re
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..files import printable, why_unreadable
from .folders import find_part
from .photographs import (
    HIDDEN,
    NO_PICTURE,
    OUTSIDE,
    Photograph,
    PhotographSource,
    has_image_suffix,
    is_system_entry,
)
from .webdataset import REPLACED

LOCAL_HEADER = struct.Struct("<4s22xHH")  # before a member's content: mark, lengths of its name and of what follows
MAX_PICTURE = 2**28  # bytes of one picture's file: more is taken for an archive bomb
DRIVE = re.compile("[A-Za-z]:/")


class _Member(NamedTuple):
    archive: Path
    offset: int
    packed: int
    size: int
    crc: int
    method: int


class ZipSource(PhotographSource):
    """Archives of `IDENTITY/*.jpg`, or of one folder with these, read as `FolderSource` reads what they unpack to.

    Args:
        archives: the files; an identity is in one of them.
        nested: see `FolderSource`.

    Raises:
        ValueError: an archive is damaged or hostile, an identity is in two archives, or the folders may be parts of a
            set instead of identities.
    """

    def __init__(self, archives: list[Path], nested: bool = False):
        self.archives, self.photographs, self.left_out = archives, [], {}
        self.members: dict[str, _Member] = {}
        of: dict[str, Path] = {}
        for archive in archives:
            pictures = self._index(archive, nested)
            for identity in dict.fromkeys(photograph.identity for photograph in pictures):
                if of.setdefault(identity, archive) != archive:
                    raise ValueError(
                        f"{of[identity].name} and {archive.name} both have an identity {identity!r}: it may be two"
                        " people. Give the archives one by one."
                    )
            self.photographs += pictures

    def _index(self, archive: Path, nested: bool) -> list[Photograph]:
        members = self._members(archive)
        paths = {name: PurePosixPath(name).parts for name in members}
        around = _is_around(list(paths.values()), nested)
        inner: dict[str, set[str]] = {}
        photographs = []
        for name in sorted(members, key=lambda name: paths[name]):
            folder, *within = parts = paths[name][around:]
            file = f"{archive.name}:{name}"
            if not within:
                self.left_out[file] = OUTSIDE
                continue
            self.members[file] = members[name]
            photographs.append(Photograph(folder, file))
            inner.setdefault(folder, set()).add("/".join(parts[:-1]))
        direct = any(folder in folders for folder, folders in inner.items())
        part = None if direct or nested else find_part(inner)
        if part is not None:
            raise ValueError(
                f"{archive} has no pictures directly in its folders, but in folders within them, such as"
                f" {min(inner[part])}. If that is PART/PERSON, unpack it and give {part}. If it is PERSON/VIDEO, run"
                f" `uiface convert {archive} OUTPUT --format imagefolder --nested` and give OUTPUT."
            )
        return photographs

    def _members(self, archive: Path) -> dict[str, _Member]:
        """The pictures in an archive by their names; what else is there is left out with the reason."""
        members: dict[str, _Member] = {}
        packed = 0
        try:
            with zipfile.ZipFile(archive) as opened:
                entries = opened.infolist()
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
            raise ValueError(f"no zip archive: {_why(archive, error)}.") from error
        for entry in entries:
            name = printable(entry.filename.replace("\\", "/"))
            _check_name(archive, name)
            packed += entry.compress_size
            reason = None if entry.is_dir() else _why_left_out(entry, name)
            path = str(PurePosixPath(name))
            if reason is not None:
                self.left_out[f"{archive.name}:{path}"] = reason
            elif not entry.is_dir():
                if path in members:
                    self.left_out[f"{archive.name}:{path} (earlier)"] = REPLACED
                members[path] = _Member(
                    archive, entry.header_offset, entry.compress_size, entry.file_size, entry.CRC, entry.compress_type
                )
        if packed > archive.stat().st_size:
            raise ValueError(f"{archive} has members that lie within each other: an archive bomb. Not read.")
        return members

    def content(self, photograph: Photograph) -> bytes:
        archive, offset, packed, size, crc, method = self.members[photograph.file]
        with open(archive, "rb") as file:
            file.seek(offset)
            head = file.read(LOCAL_HEADER.size)
            mark, *lengths = LOCAL_HEADER.unpack(head) if len(head) == LOCAL_HEADER.size else (b"", 0, 0)
            if mark != b"PK\x03\x04":
                raise OSError(f"{archive}: {photograph.file} is not at its place: the archive is damaged.")
            file.seek(sum(lengths), 1)
            content = file.read(packed)
        try:
            if method == zipfile.ZIP_DEFLATED:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        except zlib.error as error:
            raise OSError(f"{photograph.file} is damaged: {error}.") from error
        if len(content) != size or zlib.crc32(content) != crc:
            raise OSError(f"{photograph.file} is damaged: its checksum is another one.")
        return content

    def stamp(self, photograph: Photograph) -> str:
        member = self.members[photograph.file]
        return f"{member.size} {member.crc:08x}"


def _is_around(paths: list[tuple[str, ...]], nested: bool) -> bool:
    """Whether the only folder is around all identities. With pictures of its own and a single folder within, it is an
    identity, as `FolderSource` reads it; with several within, it is one where `nested` says so."""
    within = {parts[1] for parts in paths if len(parts) > 2}
    direct = any(len(parts) == 2 for parts in paths)
    return len({parts[0] for parts in paths}) == 1 and len(within) > direct and not (nested and direct)


def _check_name(archive: Path, name: str) -> None:
    if name.startswith("/") or DRIVE.match(name) or ".." in PurePosixPath(name).parts:
        raise ValueError(
            f"{archive} has a member {name!r}, which leads out of its folder: a hostile archive. Not read."
        )


def _why_left_out(entry: zipfile.ZipInfo, name: str) -> str | None:
    kind = entry.external_attr >> 16 & 0o170000
    if kind not in (0, 0o100000):
        return "a link or a special file"
    if any(is_system_entry(part) for part in PurePosixPath(name).parts):
        return HIDDEN
    if not has_image_suffix(name):
        return NO_PICTURE
    if entry.flag_bits & 1:
        return "encrypted"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "compressed by another method than deflate"
    return f"of more than {MAX_PICTURE} bytes" if entry.file_size > MAX_PICTURE else None


def _why(archive: Path, error: object) -> str:
    with open(archive, "rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":  # by its beginning
        return f"{archive} is damaged or cut short ({error}): copy it again"
    return why_unreadable(archive, error)
