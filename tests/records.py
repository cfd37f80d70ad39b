"""Writes InsightFace's RecordIO, for tests of what reads it."""

import struct
from pathlib import Path

MAGIC = b"\x0a\x23\xd7\xce"


class RecordWriter:
    """MXNet's RecordIO with an index, written after dmlc-core's description."""

    def __init__(self, path: Path):
        self.path, self.index = path, []
        self.file = open(path, "wb")

    def write(self, key: int, data: bytes) -> None:
        self.index.append(f"{key}\t{self.file.tell()}\n")
        # cut where the magic number stands at a multiple of four
        parts, start = [], 0
        for position in range(0, len(data) - 3, 4):
            if data[position : position + 4] == MAGIC:
                parts.append(data[start:position])
                start = position + 4
        parts.append(data[start:])
        for i, part in enumerate(parts):
            flag = 0 if len(parts) == 1 else 1 if i == 0 else 3 if i == len(parts) - 1 else 2
            self.file.write(MAGIC + (flag << 29 | len(part)).to_bytes(4, "little") + part + b"\0" * (-len(part) % 4))

    def close(self) -> None:
        self.file.close()
        self.path.with_suffix(".idx").write_text("".join(self.index))


def image_record(label: float | list[float], number: int, content: bytes) -> bytes:
    """Both forms of the header: one label within, or flag and label array behind."""
    if isinstance(label, list):
        return struct.pack("<IfQQ", len(label), 0.0, number, 0) + struct.pack(f"<{len(label)}f", *label) + content
    return struct.pack("<IfQQ", 0, label, number, 0) + content
