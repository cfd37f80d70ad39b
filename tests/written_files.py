"""Pictures in the files and archives that people have them in."""

import io
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import draw_person
from records import RecordWriter, image_record

from uiface_diffusers.data.convert import FORMATS

try:
    import lmdb
    import msgpack
except ImportError:
    lmdb = msgpack = None
needs_lmdb = pytest.mark.skipif(lmdb is None, reason="needs the packages lmdb and msgpack")
# all that `uiface convert` writes
FORMS = [pytest.param(form, marks=needs_lmdb if form == "lmdb" else ()) for form in FORMATS]

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 5\n"


def picture(value: int = 1, kind: str = "png", size: int = 8) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (size, size), (value, 0, 255 - value)).save(buffer, kind)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_records(path: Path, labels: list[float], keys: list[int] | None = None) -> Path:
    """Pictures without InsightFace's record 0, as im2rec and DCFace's tool write them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = RecordWriter(path)
    for number, label in enumerate(labels):
        key = number if keys is None else keys[number]
        writer.write(key, image_record(float(label), key, picture(number)))
    writer.close()
    return path


def write_faces(path, label_arrays: bool, broken: bool = False) -> list[np.ndarray]:
    """Six faces of three people as InsightFace writes them: record 0 says where the pictures end, behind them come the
    identities' records."""
    writer, faces = RecordWriter(path), []
    writer.write(0, image_record([7.0, 10.0], 0, b""))
    for key in range(1, 7):
        face = np.asarray(draw_person((key * 40, 0, 200), ((56, 56, 44),), size=(112, 112)))
        faces.append(face)
        png = io.BytesIO()
        PIL.Image.fromarray(face).save(png, "png")
        content = b"no picture" if broken and key == 2 else png.getvalue()
        identity = float((key - 1) // 2)
        writer.write(key, image_record([identity, 0.5] if label_arrays else identity, key, content))
    for identity in range(3):
        writer.write(7 + identity, image_record([1.0 + 2 * identity, 3.0 + 2 * identity], 7 + identity, b""))
    writer.close()
    return faces
