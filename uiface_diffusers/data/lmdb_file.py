"""Finds the records in an LMDB file, by its layout on the disk (LMDB 0.9, `mdb.c`: data version 1, 64 bits, little
endian).

LMDB's own library maps the file into memory and trusts what is in it: a file that was cut short ends the process, and
a process cannot open it twice. Here, a damaged or hostile file is an error like any other.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..files import why_unreadable

MAGIC, VERSION = 0xBEEFC0DE, 1
HEADER = 16  # bytes that each page begins with
PAGE = struct.Struct("<QHHHH")  # number, padding, flags, where the node's places end, where the nodes begin
BRANCH, LEAF, OVERFLOW = 1, 2, 4
NODE = struct.Struct("<HHHH")  # size or page of the data, low and high; flags; size of the key
BIG, SUB_DATABASE, DUPLICATES = 1, 2, 4
META = struct.Struct("<IIQQ")  # magic, version, address, map size
DATABASE = struct.Struct("<IHHQQQQQ")  # page size, flags, depth, three numbers of pages, entries, root
SORTED_DUPLICATES = 4
NOTHING = 2**64 - 1  # the root of an empty database


class Record(NamedTuple):
    """A key and the place of its value in the file."""

    key: bytes
    offset: int
    size: int


class _Root(NamedTuple):
    page_size: int
    flags: int
    entries: int
    page: int


def _read_roots(file: BinaryIO) -> dict[int, _Root]:
    """Transaction -> the database's root, of the two pages that the file begins with."""
    roots: dict[int, _Root] = {}
    size, place = 0, 0
    for _ in range(2):
        file.seek(place)
        start = file.read(HEADER + META.size + 2 * DATABASE.size + 16)
        if len(start) < HEADER + META.size + 2 * DATABASE.size + 16:
            raise ValueError("no records")
        magic, version, _, _ = META.unpack_from(start, HEADER)
        if (magic, version) != (MAGIC, VERSION):
            raise ValueError("not LMDB's first bytes, of 64 bits and little endian")
        free = DATABASE.unpack_from(start, HEADER + META.size)
        main = DATABASE.unpack_from(start, HEADER + META.size + DATABASE.size)
        transaction = struct.unpack_from("<QQ", start, HEADER + META.size + 2 * DATABASE.size)[1]
        size = size or free[0]
        if not 256 <= size <= 65536:
            raise ValueError(f"pages of {size} bytes")
        roots[transaction] = _Root(size, main[1], main[6], main[7])
        place = size
    return roots


def _nodes(page: bytes, lower: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Of each node: its low and high number, flags, size of the key, and where the key starts in the page."""
    for place in range(HEADER, lower, 2):
        (start,) = struct.unpack_from("<H", page, place)
        low, high, flags, key = NODE.unpack_from(page, start)
        if start + NODE.size + key > len(page):
            raise ValueError("a key that leaves its page")
        yield low, high, flags, key, start + NODE.size


def iterate_records(path: Path) -> Iterator[Record]:
    """The records of a file's main database, by their keys.

    Args:
        path: of the file itself, such as `data.mdb`.

    Raises:
        ValueError: the file is missing, cut short, damaged or of another kind.
    """
    try:
        with open(path, "rb") as file:
            roots = _read_roots(file)
            root = roots[max(roots)]
            if root.flags & SORTED_DUPLICATES:
                raise ValueError("its keys have several values each")
            found = 0
            for record in _walk(file, root, path.stat().st_size):
                found += 1
                yield record
            if found != root.entries:
                raise ValueError(f"{found} records of the {root.entries} that it announces")
    except (ValueError, struct.error, IsADirectoryError, FileNotFoundError) as error:
        raise ValueError(f"no LMDB file: {why_unreadable(path, error)}.") from error


def _walk(file: BinaryIO, root: _Root, end: int) -> Iterator[Record]:
    pages, seen = [] if root.page == NOTHING else [root.page], set()
    while pages:
        number = pages.pop()
        if number in seen or number < 2:
            raise ValueError(f"page {number} in a place of another one")
        seen.add(number)
        if (number + 1) * root.page_size > end:
            raise ValueError(f"it ends at byte {end}, before its page {number}")
        file.seek(number * root.page_size)
        page = file.read(root.page_size)
        _, _, flags, lower, _ = PAGE.unpack_from(page)
        if flags & BRANCH:
            below = [low | high << 16 | more << 32 for low, high, more, _, _ in _nodes(page, lower)]
            pages += reversed(below)
        elif flags & LEAF:
            yield from _leaf(file, page, lower, number * root.page_size, root.page_size, end)
        else:
            raise ValueError(f"page {number} of an unknown kind")


def _leaf(file: BinaryIO, page: bytes, lower: int, offset: int, page_size: int, end: int) -> Iterator[Record]:
    for low, high, flags, length, place in _nodes(page, lower):
        key, size = page[place : place + length], low | high << 16
        if flags & (SUB_DATABASE | DUPLICATES):
            raise ValueError(f"a database within it, {key.decode('utf-8', 'backslashreplace')}")
        start = offset + place + length
        if flags & BIG:
            (number,) = struct.unpack_from("<Q", page, place + length)
            start = number * page_size + HEADER
            file.seek(number * page_size)
            head = file.read(HEADER)
            if len(head) == HEADER and not PAGE.unpack(head)[2] & OVERFLOW:
                raise ValueError(f"page {number} in a place of another one")
        elif place + length + size > page_size:
            raise ValueError("a value that leaves its page")
        if start + size > end:
            raise ValueError(f"it ends at byte {end}, within the value of {key.decode('utf-8', 'backslashreplace')}")
        yield Record(key, start, size)
