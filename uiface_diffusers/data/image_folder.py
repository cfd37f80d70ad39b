"""Writing a data set of generated images: files, their rows of metadata, tar shards."""

import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import complete_file
from ..models import CONDITIONS

# first bytes of a file, and Pillow's options
IMAGE_FORMATS = {
    "png": (b"\x89PNG\r\n\x1a\n", {}),
    "jpeg": (b"\xff\xd8\xff", {"quality": 95, "subsampling": 0}),
    "webp": (b"RIFF", {"quality": 95}),
}
IMAGES_A_SHARD = 1000
GENERATION = "generation.json"
METADATA = "metadata.parquet"
JOURNAL = "journal"


# of what images were conditioned on beside their identity
CONDITION_COLUMNS = [name for projector in CONDITIONS.values() for name in projector.fields]


@dataclass(frozen=True, slots=True)
class ImageKey:
    """
    Args:
        identity (`str`): name in the bank.
        index (`int`): number of the image within its identity.
    """

    identity: str
    index: int


@dataclass(frozen=True)
class ImageRow:
    """
    Args:
        identity (`str`): name in the bank.
        index (`int`): number of the image within its identity.
        seed (`int`): of the image's noise.
        attempt (`int`): 0, or the sub-seed that gave the similarity that was asked for.
        boundary_timestep (`int`): the first timestep that followed the identity; -1 for none.
        perturbation (`float`, *optional*): cosine of the perturbed embedding to the identity's.
        similarity (`float`, *optional*): cosine of the image's embedding to the identity's.
        size (`int`): of the file in bytes.
        layout (`str`, *optional*): name of the picture that it took its layout from, in its source.
        conditions (`dict[str, float]`): the values that it was given, each a column of its own: yaw and pitch.
    """

    identity: str
    index: int
    seed: int
    attempt: int
    boundary_timestep: int
    perturbation: float | None
    similarity: float | None
    size: int
    layout: str | None = None
    conditions: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> "ImageRow":
        """The row that has these columns."""
        conditions = {name: value for name, value in columns.items() if name in CONDITION_COLUMNS}
        own = {name: value for name, value in columns.items() if name not in conditions}
        return cls(**own, conditions={name: value for name, value in conditions.items() if value is not None})

    @property
    def key(self) -> ImageKey:
        return ImageKey(self.identity, self.index)

    def columns(self) -> dict[str, Any]:
        """Of a set without layouts or conditions, there is none for them."""
        columns = asdict(self)
        conditions = columns.pop("conditions")
        if self.layout is None:
            del columns["layout"]
        return columns | conditions


SCHEMA = pa.schema(
    [
        ("file_name", pa.string()),
        ("identity", pa.string()),
        ("index", pa.int64()),
        ("seed", pa.int64()),
        ("attempt", pa.int64()),
        ("boundary_timestep", pa.int64()),
        ("perturbation", pa.float32()),
        ("similarity", pa.float32()),
        ("size", pa.int64()),
    ]
)


def metadata_schema(rows: Sequence[ImageRow]) -> pa.Schema:
    """Of the metadata of some images: `SCHEMA`, and `layout` and columns of conditions if any of them has one."""
    further = [] if all(row.layout is None for row in rows) else [pa.field("layout", pa.string())]
    conditions = {name for row in rows for name in row.conditions}
    further += [pa.field(name, pa.float32()) for name in CONDITION_COLUMNS if name in conditions]
    return pa.schema([*SCHEMA, *further])


def image_name(identity: str, index: int, image_format: str) -> str:
    return f"{identity}/{index:04d}.{'jpg' if image_format == 'jpeg' else image_format}"


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"


def encode_image(image: PIL.Image.Image, image_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **IMAGE_FORMATS[image_format][1])
    return buffer.getvalue()


def is_complete_image(path: Path, size: int, image_format: str) -> bool:
    """Whether a file has the size that was written and its format's first bytes."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            return start.startswith(IMAGE_FORMATS[image_format][0]) and os.fstat(file.fileno()).st_size == size
    except OSError:
        return False


class Journal:
    """Rows of finished images, a line each, of one part of a run."""

    def __init__(self, output: Path, part: tuple[int, int]):
        self.path = output / JOURNAL / f"{part[0]}-of-{part[1]}.jsonl"
        if self.path.exists():
            # a line that a kill has cut short would spoil the next one
            content = self.path.read_bytes()
            os.truncate(self.path, content.rfind(b"\n") + 1)

    def append(self, rows: Iterable[ImageRow]) -> None:
        lines = "".join(json.dumps(row.columns()) + "\n" for row in rows)
        self.path.parent.mkdir(exist_ok=True)
        with open(self.path, "ab") as file:
            file.write(lines.encode())


def read_rows(output: Path) -> dict[ImageKey, ImageRow]:
    """Rows of all finished images, from the metadata and from all journals.

    Raises:
        ValueError: the metadata are damaged.
    """
    rows: dict[ImageKey, ImageRow] = {}
    metadata = output / METADATA
    if metadata.exists():
        try:
            # a column that a set has no values of is not there
            there = set(pq.read_schema(metadata).names)
            own = [each for each in fields(ImageRow) if each.name != "conditions"]
            names = [each.name for each in own if each.name in there or each.default is MISSING]
            names += [name for name in CONDITION_COLUMNS if name in there]
            table = pq.read_table(metadata, columns=names).to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(
                f"{metadata} is damaged: restore it, or delete it and the images are made again. ({error})"
            ) from error
        rows = {row.key: row for row in (ImageRow.of(each) for each in table)}
    # of an image that was made again, the newest row counts
    for journal in sorted((output / JOURNAL).glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
        for line in journal.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                row = ImageRow.of(json.loads(line))
                rows[row.key] = row
    return rows


def write_metadata(output: Path, rows: Sequence[ImageRow], file_names: Sequence[str]) -> None:
    table = [{"file_name": name, **row.columns()} for name, row in zip(file_names, rows, strict=True)]
    with complete_file(output / METADATA) as beside:
        pq.write_table(pa.Table.from_pylist(table, metadata_schema(rows)), beside)


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def pack_shard(
    shard: Path, images: Path, names: Sequence[str], classes: Sequence[int], rows: Sequence[ImageRow]
) -> None:
    """Moves images into a tar shard of webdataset: `KEY.png`, `KEY.cls` (the identity's number) and `KEY.json` (the
    row). The shard is complete or not there at all; of one that is there, what a kill has left is cleared away."""
    if not shard.exists():
        shard.parent.mkdir(exist_ok=True)
        with complete_file(shard) as beside, tarfile.open(beside, "w") as tar:
            for name, number, row in zip(names, classes, rows, strict=True):
                key, suffix = name.rsplit(".", 1)
                members = {suffix: (images / name).read_bytes(), "cls": str(number).encode()}
                members["json"] = json.dumps(row.columns()).encode()
                for end, data in members.items():
                    add_member(tar, f"{key}.{end}", data)
    for name in names:
        (images / name).unlink(missing_ok=True)
