"""The forms of a data set's images on the disk, one class each."""

import io
import os
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.image_folder import (
    IMAGES_A_SHARD,
    ImageKey,
    ImageRow,
    encode_image,
    image_name,
    is_complete_image,
    metadata_schema,
    pack_shard,
    shard_name,
)
from ..data.parquet_set import ROWS_A_GROUP, hub_schema, write_parquet
from ..files import complete_file
from .plan import Part, Plan


class ImageFolder:
    """`images/IDENTITY/NNNN.png`.

    Args:
        output: the data set's folder.
        plan: its images.
        size (`int`): their height and width.
        image_format (`str`): one of `IMAGE_FORMATS`.
    """

    # of the data set's card, where `datasets` reads it
    data_files: str | list[str] = ["images/**", "metadata.parquet"]

    def __init__(self, output: Path, plan: Plan, size: int, image_format: str):
        self.output, self.plan, self.size, self.image_format = output, plan, size, image_format
        self.images = output / "images"

    def name(self, key: ImageKey) -> str:
        return image_name(key.identity, key.index, self.image_format)

    def file_name(self, key: ImageKey) -> str:
        """Of a finished image, as in the metadata."""
        return f"images/{self.name(key)}"

    def units(self, part: Part) -> list[list[ImageKey]]:
        """The images that a part makes, in groups that are closed one by one. The division does not depend on the
        batch size, which may be another one on another machine."""
        return [self.plan.keys[part.position :: part.total]]

    def is_made(self, key: ImageKey, row: ImageRow | None) -> bool:
        return row is not None and is_complete_image(self.images / self.name(key), row.size, self.image_format)

    def is_finished(self, key: ImageKey, row: ImageRow | None) -> bool:
        """The image is made, and where `file_name` says."""
        return self.is_made(key, row)

    def save(self, key: ImageKey, picture: PIL.Image.Image) -> int:
        """Writes an image; returns the size of the file."""
        side = (self.size, self.size)
        if picture.size != side:
            picture = picture.resize(side, PIL.Image.Resampling.BILINEAR)
        content = encode_image(picture, self.image_format)
        path = self.images / self.name(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete_file(path) as beside:
            beside.write_bytes(content)
        return len(content)

    def close(self, unit: Sequence[ImageKey], rows: Mapping[ImageKey, ImageRow]) -> None:
        """After all images of a unit."""

    def open(self, key: ImageKey) -> PIL.Image.Image:
        return PIL.Image.open(self.output / self.file_name(key))

    def clean_up(self) -> None:
        """Of a complete data set."""
        for cut_short in self.images.glob("*/*.part"):
            cut_short.unlink()


class TarShards(ImageFolder):
    """`shards/NNNNNN.tar` of webdataset, one for a thousand planned images; a folder's images until one is packed. All
    images of a shard are made by one process, and do not wait for another shard's."""

    data_files = "shards/*.tar"

    def shard(self, key: ImageKey) -> Path:
        return self.output / "shards" / shard_name(self.plan.position(key) // IMAGES_A_SHARD)

    def file_name(self, key: ImageKey) -> str:
        return f"shards/{self.shard(key).name}/{self.name(key)}"

    def units(self, part: Part) -> list[list[ImageKey]]:
        keys = self.plan.keys
        shards = [keys[start : start + IMAGES_A_SHARD] for start in range(0, len(keys), IMAGES_A_SHARD)]
        return shards[part.position :: part.total]

    def is_made(self, key: ImageKey, row: ImageRow | None) -> bool:
        return self.is_finished(key, row) or super().is_made(key, row)

    def is_finished(self, key: ImageKey, row: ImageRow | None) -> bool:
        return row is not None and self.shard(key).exists()

    def close(self, unit: Sequence[ImageKey], rows: Mapping[ImageKey, ImageRow]) -> None:
        names, classes = [self.name(key) for key in unit], [self.plan.rows[key.identity] for key in unit]
        pack_shard(self.shard(unit[0]), self.images, names, classes, [rows[key] for key in unit])

    def open(self, key: ImageKey) -> PIL.Image.Image:
        with tarfile.open(self.shard(key)) as tar:
            member = tar.extractfile(self.name(key))
            assert member is not None  # a file, not a folder
            return PIL.Image.open(io.BytesIO(member.read()))

    def clean_up(self) -> None:
        shutil.rmtree(self.images, ignore_errors=True)  # empty folders
        for cut_short in self.shard(self.plan.keys[0]).parent.glob("*.part"):
            cut_short.unlink()


class ParquetShards(TarShards):
    """`data/train-NNNNN-of-NNNNN.parquet` as the Hub's viewer shows it, one for a thousand planned images: the image
    and its row of metadata."""

    data_files = "data/*.parquet"

    def shard(self, key: ImageKey) -> Path:
        number, total = self.plan.position(key) // IMAGES_A_SHARD, -(-len(self.plan.keys) // IMAGES_A_SHARD)
        return self.output / "data" / f"train-{number:05d}-of-{total:05d}.parquet"

    def file_name(self, key: ImageKey) -> str:
        return f"data/{self.shard(key).name}/{self.name(key)}"

    def close(self, unit: Sequence[ImageKey], rows: Mapping[ImageKey, ImageRow]) -> None:
        shard = self.shard(unit[0])
        if not shard.exists():
            fields = metadata_schema([rows[key] for key in unit])
            schema = hub_schema({field.name: field.type for field in fields if field.name != "file_name"})
            write_parquet(shard, schema, (self._row(key, rows[key]) for key in unit))
        for key in unit:
            (self.images / self.name(key)).unlink(missing_ok=True)

    def _row(self, key: ImageKey, row: ImageRow) -> dict[str, Any]:
        content = (self.images / self.name(key)).read_bytes()
        return {"image": {"bytes": content, "path": self.name(key)}, **row.columns()}

    def open(self, key: ImageKey) -> PIL.Image.Image:
        row = self.plan.position(key) % IMAGES_A_SHARD
        with pa.OSFile(os.fspath(self.shard(key))) as file:
            group = pq.ParquetFile(file).read_row_group(row // ROWS_A_GROUP, columns=["image"])
            image = group["image"][row % ROWS_A_GROUP].as_py()
        return PIL.Image.open(io.BytesIO(image["bytes"]))


OUTPUT_FORMATS: dict[str, type[ImageFolder]] = {
    "imagefolder": ImageFolder,
    "webdataset": TarShards,
    "parquet": ParquetShards,
}
