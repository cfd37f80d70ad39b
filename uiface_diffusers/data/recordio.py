"""Reads and writes MXNet's RecordIO, the form in which CASIA-WebFace, MS1M and WebFace circulate, without MXNet.

A file is a sequence of records: magic number, a word with 3 bits of continuation flag and 29 bits of length, the
data, padded to four bytes (dmlc-core, `recordio.h`). In an image record, the data starts with a header
`flag, label, id, id2` (`IfQQ`); a flag above zero says that so many float32 labels follow and stand for the one in the
header.
"""

import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from ..files import LFS_POINTER, iterate_lines, local_path, why_unreadable

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
HEADER = struct.Struct("<IfQQ")
# continuation flags: a record whole, or its first, middle and last part
WHOLE, FIRST, MIDDLE, LAST = range(4)
# labels are float32: from here on, not every whole number has one of its own
INEXACT = 2**24


class ImageRecord(NamedTuple):
    """Labels (float32, one or more), the record's number, and the picture's file in bytes."""

    labels: np.ndarray
    id: int
    content: bytes


class RecordReader:
    """Random access to the records of `NAME.rec` by the keys of `NAME.idx`.

    Args:
        path: the `.rec` file; the `.idx` file is beside it. Without one, the record file is read through once: keys
            are the numbers in the records' headers if they differ, otherwise positions in the file.

    Raises:
        ValueError: the file is missing or not of this form, or the index has a key twice.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = local_path(path)
        self.index = self.path.with_suffix(".idx")
        if not self.path.is_file():
            raise ValueError(f"{self.path} is missing.")
        with open(self.path, "rb") as file:
            if file.read(len(LFS_POINTER)) in (LFS_POINTER, b""):
                raise ValueError(f"no record file: {why_unreadable(self.path, 'no records')}.")
        self.size = self.path.stat().st_size
        # opened by each process that reads
        self._file: BinaryIO | None = None
        self._process: int | None = None
        # of the walk that finds the records where there is no index, until `scan` gives them away
        self._labels: dict[int, float] | None = None
        self.offsets = _read_index(self.index) if self.index.is_file() else self._rebuild_index()

    def __getstate__(self) -> dict:
        # for the workers of a DataLoader that are not forked
        return {**self.__dict__, "_file": None, "_process": None}

    @property
    def keys(self) -> list[int]:
        return list(self.offsets)

    def _open(self, offset: int) -> BinaryIO:
        """The file, at a place; each process opens its own."""
        if self._file is None or self._process != os.getpid():
            self._file, self._process = open(self.path, "rb"), os.getpid()
        self._file.seek(offset)
        return self._file

    def read(self, key: int) -> bytes:
        """The data of a record.

        Raises:
            OSError: the file is truncated or damaged there.
        """
        return self._read(self.offsets[key], f"key {key}")

    def _read(self, offset: int, name: str) -> bytes:
        file = self._open(offset)
        parts, expected = [], (WHOLE, FIRST)
        while True:
            magic, flag, length = _head(file.read(8))
            if magic != MAGIC or flag not in expected:
                raise OSError(f"{self.path}: no record at the place of {name}: damaged, or of another index.")
            data = file.read(length)
            if len(data) < length:
                raise OSError(f"{self.path}: the record of {name} is truncated.")
            file.seek(-length % 4, os.SEEK_CUR)
            parts.append(data)
            if flag in (WHOLE, LAST):
                # a record is cut where its data holds the magic number, which is left out
                return MAGIC_BYTES.join(parts)
            expected = (MIDDLE, LAST)

    def read_image(self, key: int) -> ImageRecord:
        """A record of a picture.

        Raises:
            OSError: the record is damaged.
        """
        return self._read_image(self.offsets[key], f"key {key}")

    def _read_image(self, offset: int, name: str) -> ImageRecord:
        data = self._read(offset, name)
        if len(data) < HEADER.size:
            raise OSError(f"{self.path}: the record of {name} has no header.")
        flag, label, number, _ = HEADER.unpack_from(data)
        end = HEADER.size + 4 * flag
        if len(data) < end:
            raise OSError(f"{self.path}: the record of {name} has {flag} labels but ends before them.")
        labels = np.frombuffer(data[HEADER.size : end], "<f4") if flag else np.array([label], np.float32)
        return ImageRecord(labels, number, data[end:])

    def read_length(self, key: int) -> int:
        """Bytes of a record (of its first part, if it is cut), without reading them."""
        return _head(self._open(self.offsets[key]).read(8))[2]

    def image_keys(self) -> list[int]:
        """Keys of the pictures. InsightFace's files start with a record 0 without picture, whose label array says
        where the pictures end: behind them come records of the identities.

        Raises:
            OSError: record 0 is damaged.
            ValueError: there are pictures behind the end.
        """
        keys = sorted(self.offsets)
        if keys and keys[0] == 0:
            first = self.read_image(0)
            if not first.content and len(first.labels) >= 1:
                # an index may list only some of them
                expected, found = picture_range(keys, float(first.labels[0]), self._has_picture)
                beyond = next((key for key in keys[1 + found :] if self._has_picture(key)), None)
                if beyond is not None:
                    raise ValueError(
                        f"{self.path} has pictures behind the {expected} that it announces, from key {beyond} on: it"
                        " looks like several files joined. Give them one by one."
                    )
                return keys[1 : 1 + found]
        return keys

    def _has_picture(self, key: int) -> bool:
        return bool(self.read_image(key).content)

    def scan(self) -> tuple[dict[int, float], dict[int, float]]:
        """Goes through all records once.

        Returns:
            Key -> (first) label of each record that holds a picture; and the same of those that the index does not
            list, by their places in bytes from the file's start.

        Raises:
            OSError: there is no record where one has to be.
            ValueError: the index is of another file, or the file is cut short.
        """
        if self._labels is not None:
            known, self._labels = self._labels, None
            return known, {}
        end = 0
        labels: dict[int, float] = {}
        missing: dict[int, float] = {}
        places = sorted(self.offsets.items(), key=itemgetter(1))
        for key, offset in tqdm(places, desc="index", unit="record"):
            if offset >= self.size:
                raise ValueError(
                    f"{self.path} ends at byte {self.size}, {self.index.name} has the record of key {key} at byte"
                    f" {offset}: the file is cut short, or the index is of another one. Copy both again."
                )
            end = self._walk(end, offset, missing)
            if end > offset:
                raise ValueError(
                    f"{self.index} has the record of key {key} at byte {offset}, which lies within another record of"
                    f" {self.path.name}: the index is of another file, or lists a record twice."
                )
            end, label, _ = self._scan_record(offset)
            if label is not None:
                labels[key] = label
        self._walk(end, self.size, missing)
        return labels, missing

    def _walk(self, position: int, until: int, missing: dict[int, float]) -> int:
        """Goes over records that are in no index, and notes those with pictures."""
        while position < until:
            end, label, _ = self._scan_record(position)
            if label is not None:
                missing[position] = label
            position = end
        return position

    def _scan_record(self, offset: int) -> tuple[int, float | None, int]:
        """Where a record ends, its (first) label, or None if it has no picture, and the number in its header."""
        start = self._open(offset).read(8 + HEADER.size + 4)
        end = self._record_end(offset, start[:8])
        # nearly always the label lies in the record's first part
        if len(start) == 8 + HEADER.size + 4:
            flag, label, number, _ = HEADER.unpack_from(start, 8)
            if _head(start)[2] > HEADER.size + 4 * flag:
                return end, struct.unpack_from("<f", start, 8 + HEADER.size)[0] if flag else label, number
        record = self._read_image(offset, f"byte {offset}")
        return end, float(record.labels[0]) if record.content else None, record.id

    def _record_end(self, offset: int, head: bytes) -> int:
        """Where the record at a place ends, with its padding; `head` is its first 8 bytes."""
        start, flag = offset, FIRST
        while flag not in (WHOLE, LAST):
            if offset > start:
                head = self._open(offset).read(8)
            magic, flag, length = _head(head)
            if magic != MAGIC:
                raise OSError(f"{self.path}: no record at byte {offset}: damaged, or of another index.")
            offset += 8 + length + -length % 4
        if offset - (-length % 4) > self.size:
            raise OSError(
                f"{self.path}: the record at byte {start} is truncated: the file is cut short. Copy it again."
            )
        return offset

    def _rebuild_index(self) -> dict[int, int]:
        offset, offsets, numbers, labels = 0, [], [], []
        with tqdm(total=self.size, unit="B", unit_scale=True, desc=f"{self.index.name} is missing, index") as progress:
            while offset < self.size:
                try:
                    end, label, number = self._scan_record(offset)
                except OSError as error:
                    raise ValueError(f"{self.path} cannot be read without {self.index.name}: {error}") from error
                offsets.append(offset)
                numbers.append(number)
                labels.append(label)
                progress.update(end - offset)
                offset = end
        keys = numbers if len(set(numbers)) == len(numbers) else range(len(offsets))
        self._labels = {key: label for key, label in zip(keys, labels, strict=True) if label is not None}
        return dict(zip(keys, offsets, strict=True))


def _head(start: bytes) -> tuple[int | None, int, int]:
    """Magic number, continuation flag and length that a record's part starts with; no magic number at a file's end."""
    magic, word = struct.unpack_from("<II", start) if len(start) >= 8 else (None, 0)
    return magic, word >> 29, word & (2**29 - 1)


def _read_index(path: Path) -> dict[int, int]:
    offsets: dict[int, int] = {}
    for number, line in enumerate(iterate_lines(path), start=1):
        if not line.strip():
            continue
        try:
            key, offset = map(int, line.split())
        except ValueError as error:
            raise ValueError(f"{path} is no index of the form KEY OFFSET: line {number} is {line!r}.") from error
        if key in offsets:
            raise ValueError(
                f"{path} has key {key} twice, at byte {offsets[key]} and at byte {offset}: one record would hide the"
                " other. Delete the index: the records are then found without it."
            )
        offsets[key] = offset
    if not offsets:
        raise ValueError(f"{path} is empty. Copy it again, or delete it: the records are then found without it.")
    return offsets


def picture_range(keys: Sequence[int], end: float, has_picture: Callable[[int], bool]) -> tuple[int, int]:
    """How many pictures InsightFace's record 0 announces, and how many are listed.

    Args:
        keys: all keys, ascending, from 0 on; the pictures have 1 to `end` - 1.
        end: what record 0 says. It is a float32: from 2^24 on it may be rounded, and the records about it decide.
        has_picture: whether the record of a key holds a picture; those of identities do not.
    """
    if end < INEXACT:
        return int(end) - 1, bisect_left(keys, int(end)) - 1
    slack = int(np.spacing(np.float32(end)))
    position, last = bisect_left(keys, int(end) - slack), bisect_right(keys, int(end) + slack)
    while position < last and has_picture(keys[position]):
        position += 1
    return keys[position - 1], position - 1


class RecordWriter:
    """Writes `NAME.rec` and `NAME.idx` as InsightFace's tools do, for its loaders: record 0 says where the pictures
    end, pictures have the keys from 1 on, and behind them a record of each identity has the range of its pictures.

    Args:
        path: the `.rec` file.
    """

    def __init__(self, path: Path):
        self.key = 0
        self.ranges: list[tuple[int, int, int]] = []  # of labels: keys from, to
        self._records, self._index = open(path, "wb"), open(path.with_suffix(".idx"), "w")
        self._write([0, 0], b"")

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None:
            end = self.key
            for _, first, last in self.ranges:
                self._write([first, last], b"")
            # only now it is known what record 0 has to say
            self._records.seek(8 + HEADER.size)
            self._records.write(struct.pack("<2f", end, self.key))
        self._records.close()
        self._index.close()

    def write(self, label: int, content: bytes) -> int:
        """Writes a picture's file; returns its key. All pictures of an identity follow each other."""
        if not self.ranges or self.ranges[-1][0] != label:
            self.ranges.append((label, self.key, self.key))
        self.ranges[-1] = (label, self.ranges[-1][1], self.key + 1)
        return self._write(label, content)

    def _write(self, label: int | list[int], content: bytes) -> int:
        several = label if isinstance(label, list) else []
        data = HEADER.pack(len(several), 0 if isinstance(label, list) else label, self.key, 0)
        data += struct.pack(f"<{len(several)}f", *several) + content
        self._index.write(f"{self.key}\t{self._records.tell()}\n")
        parts = _cut_at_magic(data)
        for number, part in enumerate(parts):
            flag = WHOLE if len(parts) == 1 else FIRST if not number else LAST if number == len(parts) - 1 else MIDDLE
            self._records.write(MAGIC_BYTES + struct.pack("<I", flag << 29 | len(part)) + part + bytes(-len(part) % 4))
        self.key += 1
        return self.key - 1


def _cut_at_magic(data: bytes) -> list[bytes]:
    """The parts between magic numbers at multiples of four: a reader would take them for a record's start."""
    parts, start, found = [], 0, data.find(MAGIC_BYTES)
    while found >= 0:
        if found % 4 == 0:
            parts.append(data[start:found])
            start = found + 4
        found = data.find(MAGIC_BYTES, found + (4 if found % 4 == 0 else 1))
    return [*parts, data[start:]]
