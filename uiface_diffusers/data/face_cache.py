"""Reading what `prepare_faces` wrote: `prepare.json` (the settings), `faces-NNNNN.parquet` (one shard for every 1,000
photographs) and `report.json`. `datasets.load_dataset("parquet", ...)` reads the shards, too."""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..encoders import EncoderMark
from ..files import local_path, printable, read_entries, read_settings, why_unreadable
from ..identities import IdentityBank
from ..pictures import load_photograph
from .photographs import HIDDEN, Photograph, PhotographSource, is_system_entry

if TYPE_CHECKING:
    from datasets import Dataset

FILES = ("prepare.json", "report.json", "outliers.json")


@contextmanager
def _open_shard(shard: Path) -> Iterator[pa.NativeFile]:
    """A shard to read from; errors of its content name it.

    The file is pyarrow's own. It would take a path for a pattern or an address. Its threads keep a reference to a file
    of Python's, and one that drops it while the interpreter exits aborts the process.
    """
    try:
        with pa.OSFile(os.fspath(shard)) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk or the network
            raise
        raise ValueError(
            f"no parquet file: {why_unreadable(shard, error)}. Or delete it and run `uiface prepare` again."
        ) from error


def read_shard(shard: Path, columns: list[str] | None = None, if_there: Sequence[str] = ()) -> pa.Table:
    """All columns of a shard, or some, and those of `if_there` that it has."""
    if if_there:
        there = shard_columns(shard)
        columns = [*(columns or []), *(name for name in if_there if name in there)]
    with _open_shard(shard) as file:
        return pq.read_table(file, columns=columns)


def shard_rows(shard: Path) -> int:
    with _open_shard(shard) as file:
        return pq.read_metadata(file).num_rows


def shard_columns(shard: Path) -> list[str]:
    with _open_shard(shard) as file:
        return pq.read_schema(file).names


def shard_skipped(shard: Path) -> dict[str, str]:
    """File -> why it is not in the shard."""
    with _open_shard(shard) as file:
        return json.loads((pq.read_schema(file).metadata or {}).get(b"skipped", b"{}"))


class FaceCache:
    """Reads what `prepare_faces` wrote.

    Args:
        folder: the cache.

    Raises:
        ValueError: no cache, an unfinished one, or one that is not whole.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = local_path(folder)
        if not (self.folder / "report.json").exists():
            state = "is not finished" if (self.folder / "prepare.json").exists() else "is no cache of prepared faces"
            raise ValueError(f"{self.folder} {state}: run `uiface prepare` on it.")
        self.settings = settings = read_settings(self.folder / "prepare.json")
        missing = [name for name in ("identity_encoder", "image_size") if name not in settings]
        if missing:
            raise ValueError(f"{self.folder / 'prepare.json'} is damaged: its settings have no `{missing[0]}`.")
        self.identity_encoder: str = settings["identity_encoder"]
        self.identity_encoder_fingerprint: str | None = settings.get("identity_encoder_fingerprint")
        self.image_size: int = settings["image_size"]
        # a shard can hold nothing but skipped photographs
        shards = sorted(self.folder.glob("faces-*.parquet"))
        self.shards = [shard for shard in shards if shard_rows(shard)]
        (expected,) = read_entries(self.folder / "report.json", faces=int)
        if len(self) != expected:
            raise ValueError(
                f"{self.folder} has {len(self)} faces, its report.json says {expected}: files are missing, or"
                " `uiface prepare` is at work on it. Run that again, or copy the folder anew."
            )

    def __len__(self) -> int:
        return sum(shard_rows(shard) for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the settings and the shards' sizes: the same for a copy, another one for a
        cache of other photographs or by another encoder, without reading the faces."""
        shards = [[shard.name, shard.stat().st_size, shard_rows(shard)] for shard in self.shards]
        return hashlib.sha256(json.dumps([self.settings, shards], sort_keys=True).encode()).hexdigest()[:12]

    @property
    def encoder_mark(self) -> EncoderMark:
        """By which its embeddings are told from another encoder's."""
        return EncoderMark(self.identity_encoder, self.identity_encoder_fingerprint)

    def embeddings(self) -> IdentityBank:
        """One embedding per face, `(N, identity_dim)`, in the order of `images`; the names are the identities'."""
        columns = [read_shard(shard, ["embedding", "identity"]) for shard in self.shards]
        table = pa.concat_tables(columns)
        embeddings = np.stack(table["embedding"].to_numpy())
        names, mark = table["identity"].to_pylist(), self.encoder_mark
        return IdentityBank(torch.from_numpy(embeddings), mark.name, names, mark.fingerprint)

    def poses(self) -> np.ndarray:
        """Yaw and pitch of each face (see `head_pose`), `(N, 2)` float32, in the order of `embeddings`. NaN where they
        are not known: of pictures that were aligned already, and in caches of earlier versions."""
        return self.columns(("yaw", "pitch"))

    def columns(self, names: Sequence[str]) -> np.ndarray:
        """Columns of numbers, `(N, len(names))` float32, in the order of `embeddings`. NaN where there is none."""
        tables = [read_shard(shard, ["file"], if_there=names).to_pandas() for shard in self.shards]
        tables = [table.reindex(columns=list(names)) for table in tables]
        return np.concatenate([table.to_numpy(np.float32) for table in tables])

    def images(self, positions: Sequence[int]) -> list[np.ndarray]:
        """The faces at some positions, in the order of `embeddings`."""
        wanted, offset = set(positions), 0
        found: dict[int, np.ndarray] = {}
        for shard in self.shards:
            length = shard_rows(shard)
            if any(offset <= position < offset + length for position in wanted):
                images = enumerate(self.shard_images(shard), start=offset)
                found |= {position: image for position, image in images if position in wanted}
            offset += length
        return [found[position] for position in positions]

    def shard_images(self, shard: Path) -> Iterator[np.ndarray]:
        """The faces of one shard, `(image_size, image_size, 3)` RGB bytes, one after the other; decoded in threads."""

        def decode(image: dict) -> np.ndarray:
            return load_photograph(io.BytesIO(image["bytes"]))

        with ThreadPoolExecutor() as pool:
            yield from pool.map(decode, read_shard(shard, ["image"])["image"].to_pylist())


def load_pictures(shards: Sequence[Path], decode: bool = True) -> "Dataset":
    """The pictures of shards as a data set of the `datasets` library with one column, `image`: mapped into memory, for
    access in any order; as files in bytes if not decoded.

    Raises:
        ValueError: a path has a `::`.
    """
    import datasets
    from datasets.data_files import DataFilesList

    # strings would be taken for patterns; sizes and times tell a shard from an earlier one at its place
    shards = [shard.resolve() for shard in shards]
    if any("::" in str(shard) for shard in shards):
        raise ValueError(f"{shards[0].parent} cannot be read by `datasets`, which divides paths at `::`: rename it.")
    states = [(str(shard.stat().st_size), str(shard.stat().st_mtime_ns)) for shard in shards]
    files = {"train": DataFilesList([str(shard) for shard in shards], states)}
    pictures = datasets.load_dataset("parquet", data_files=files, columns=["image"], split="train")
    return pictures if decode else pictures.cast_column("image", datasets.Image(decode=False))


class FaceCacheSource(PhotographSource):
    """The faces of a cache: each under its identity and its photograph's file."""

    def __init__(self, folder: str | os.PathLike):
        self.photographs, self.left_out = [], {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._pictures: Dataset | None = None
        cache = FaceCache(folder)
        self._shards = cache.shards
        for entry in sorted(cache.folder.iterdir()):
            if entry.name not in FILES and not entry.match("faces-*.parquet") and not entry.match("latents-*"):
                self.left_out[printable(entry.name)] = HIDDEN if is_system_entry(entry.name) else "beside the cache"
        for shard in self._shards:
            for row in read_shard(shard, ["identity", "file"]).to_pylist():
                self._places[row["file"]] = (shard, len(self.photographs))
                self.photographs.append(Photograph(row["identity"], row["file"]))

    def content(self, photograph: Photograph) -> bytes:
        if self._pictures is None:
            self._pictures = load_pictures(self._shards, decode=False)
        return self._pictures[self._places[photograph.file][1]]["image"]["bytes"]

    def stamp(self, photograph: Photograph) -> str:
        # the shard's: a face's own would have to be read
        return str(self._places[photograph.file][0].stat().st_size)
