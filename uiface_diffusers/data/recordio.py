"""Reads MXNet's RecordIO, the form in which CASIA-WebFace, MS1M and WebFace circulate, without MXNet.

A file is a sequence of records: magic number, a word with 3 bits of continuation flag and 29 bits of length, the
data, padded to four bytes (dmlc-core, `recordio.h`). In an image record, the data starts with a header
`flag, label, id, id2` (`IfQQ`); a flag above zero says that so many float32 labels follow and stand for the one in the
header.
"""

import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC = 0xCED7230A
HEADER = struct.Struct("<IfQQ")
# continuation flags: a record whole, or its first, middle and last part
WHOLE, FIRST, MIDDLE, LAST = range(4)


class ImageRecord(NamedTuple):
    """Labels (float32, one or more), the record's number, and the picture's file in bytes."""

    labels: np.ndarray
    id: int
    content: bytes


class RecordReader:
    """Random access to the records of `NAME.rec` by the keys of `NAME.idx`.

    Args:
        path: the `.rec` file; the `.idx` file is beside it.

    Raises:
        ValueError: a file is missing, or is not of this form.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        index = self.path.with_suffix(".idx")
        for file in (self.path, index):
            if not file.is_file():
                raise ValueError(f"{file} is missing: RecordIO is read by a .rec and an .idx file.")
        try:
            rows = [line.split() for line in index.read_text().splitlines() if line.strip()]
            self.offsets = {int(key): int(offset) for key, offset in rows}
        except ValueError as error:
            raise ValueError(f"{index} is no index of the form KEY OFFSET: {error}") from error
        # opened by each process that reads
        self._file, self._process = None, None

    def __getstate__(self) -> dict:
        # for the workers of a DataLoader that are not forked
        return {**self.__dict__, "_file": None, "_process": None}

    @property
    def keys(self) -> list[int]:
        return list(self.offsets)

    def _open(self):
        if self._process != os.getpid():
            self._file, self._process = open(self.path, "rb"), os.getpid()
        return self._file

    def read(self, key: int) -> bytes:
        """The data of a record.

        Raises:
            OSError: the file is truncated or damaged there.
        """
        self._open().seek(self.offsets[key])
        parts, expected = [], (WHOLE, FIRST)
        while True:
            head = self._file.read(8)
            magic, word = struct.unpack("<II", head) if len(head) == 8 else (None, 0)
            flag, length = word >> 29, word & (2**29 - 1)
            if magic != MAGIC or flag not in expected:
                raise OSError(f"{self.path}: no record at the place of key {key}: damaged, or of another index.")
            data = self._file.read(length)
            if len(data) < length:
                raise OSError(f"{self.path}: the record of key {key} is truncated.")
            self._file.seek(-length % 4, os.SEEK_CUR)
            parts.append(data)
            if flag in (WHOLE, LAST):
                # a record is cut where its data holds the magic number, which is left out
                return struct.pack("<I", MAGIC).join(parts)
            expected = (MIDDLE, LAST)

    def read_image(self, key: int) -> ImageRecord:
        """A record of a picture.

        Raises:
            OSError: the record is damaged.
        """
        data = self.read(key)
        if len(data) < HEADER.size:
            raise OSError(f"{self.path}: the record of key {key} has no header.")
        flag, label, number, _ = HEADER.unpack_from(data)
        end = HEADER.size + 4 * flag
        if len(data) < end:
            raise OSError(f"{self.path}: the record of key {key} has {flag} labels but ends before them.")
        labels = np.frombuffer(data[HEADER.size : end], "<f4") if flag else np.array([label], np.float32)
        return ImageRecord(labels, number, data[end:])

    def read_label(self, key: int) -> float:
        """The (first) label of a picture's record, without reading the picture.

        Raises:
            OSError: the record is damaged.
        """
        self._open().seek(self.offsets[key])
        start = self._file.read(8 + HEADER.size + 4)
        # nearly always the label lies in the record's first part
        if len(start) == 8 + HEADER.size + 4 and struct.unpack("<I", start[:4])[0] == MAGIC:
            length = struct.unpack("<I", start[4:8])[0] & (2**29 - 1)
            flag, label, _, _ = HEADER.unpack_from(start, 8)
            if not flag:
                return label
            if length >= HEADER.size + 4:
                return struct.unpack_from("<f", start, 8 + HEADER.size)[0]
        return float(self.read_image(key).labels[0])

    def read_length(self, key: int) -> int:
        """Bytes of a record (of its first part, if it is cut), without reading them."""
        self._open().seek(self.offsets[key] + 4)
        return int.from_bytes(self._file.read(4), "little") & (2**29 - 1)

    def image_keys(self) -> list[int]:
        """Keys of the pictures. InsightFace's files start with a record 0 without picture, whose label array says
        where the pictures end: behind them come records of the identities.

        Raises:
            OSError: record 0 is damaged.
            ValueError: pictures are missing in the index.
        """
        keys = sorted(self.offsets)
        if keys and keys[0] == 0:
            first = self.read_image(0)
            if not first.content and len(first.labels) >= 1:
                end = int(first.labels[0])
                pictures = [key for key in keys if 0 < key < end]
                if len(pictures) != end - 1:
                    raise ValueError(
                        f"{self.path.with_suffix('.idx')} lists {len(pictures)} pictures, {self.path} says that it has"
                        f" {end - 1}: the index is not whole. Copy it again."
                    )
                return pictures
        return keys
