"""Photographs -> aligned and embedded faces in parquet shards, once, for all trainers.

A cache holds `prepare.json` (the settings), `faces-NNNNN.parquet` (one shard for every 1,000 photographs) and
`report.json` (what was skipped or looks wrong, and why). `datasets.load_dataset("parquet", ...)` reads the shards.
"""

import hashlib
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from ..encoders import EncoderMark
from ..faces import (
    ALIGNED_SIZE,
    SELECTIONS,
    SIDE_VIEW,
    FaceEncoder,
    UnusableFaceError,
    align_face,
    has_direction,
    head_pose,
    load_photograph,
    out_of_frame,
    resize_aligned,
    template_landmarks,
)
from ..files import (
    check_settings,
    complete_file,
    local_path,
    printable,
    read_entries,
    read_settings,
    why_unreadable,
    write_json,
)
from ..identities import IdentityBank
from .image_folder import GENERATION
from .sources import (
    HIDDEN,
    Photograph,
    PhotographSource,
    is_system_entry,
    open_source,
    source_fingerprint,
    summarize_left_out,
    unreadable_reason,
)

if TYPE_CHECKING:
    from datasets import Dataset

FILES = ("prepare.json", "report.json", "outliers.json")
SHARD_SIZE = 1000
BATCH_SIZE = 64
# a median says nothing about fewer
LEAST_FOR_MEDIAN = 3
# columns that earlier versions did not write
POSE_COLUMNS = ["yaw", "pitch", "out_of_frame"]
# shares of the template within the photograph that the report counts the faces below
IN_FRAME = (0.9, 0.7, 0.5)


def _arrow_schema() -> pa.Schema:
    from datasets import Features, Image, Sequence, Value

    features = {
        "image": Image(),
        "identity": Value("string"),
        "file": Value("string"),
        "embedding": Sequence(Value("float32")),
        "detection_score": Value("float32"),
        "faces_found": Value("int32"),
        "photograph_sha256": Value("string"),
        # null where nothing was detected
        "landmarks": Sequence(Value("float32")),
        "yaw": Value("float32"),
        "pitch": Value("float32"),
        "out_of_frame": Value("float32"),
    }
    return Features(features).arrow_schema


def _prepare_photograph(
    photograph: np.ndarray, encoder: FaceEncoder, image_size: int, face: str, aligned: bool, min_in_frame: float | None
) -> SimpleNamespace:
    """`image` (the face at `image_size`), `for_encoder` (at 112) and `columns`, what else the cache keeps of it.

    Raises:
        UnusableFaceError: what makes the photograph unusable.
    """
    if not aligned:
        faces = encoder.detect(photograph)
        found = encoder.select(faces, photograph.shape, face)
        outside = out_of_frame(found.landmarks, photograph.shape)
        if 1 - outside < (min_in_frame or 0):
            raise UnusableFaceError(f"out of frame: {1 - outside:.3f} of the template is within the photograph")
        yaw, pitch = head_pose(found.landmarks)
        columns = {"detection_score": found.score, "faces_found": len(faces)}
        columns |= {"landmarks": template_landmarks(found.landmarks).ravel()}
        columns |= {"yaw": yaw, "pitch": pitch, "out_of_frame": outside}
        image, at_112 = (align_face(photograph, found.landmarks, size) for size in (image_size, ALIGNED_SIZE))
        return SimpleNamespace(image=image, for_encoder=at_112, columns=columns)
    image, at_112 = resize_aligned(photograph, image_size), resize_aligned(photograph)
    if len(photograph) < ALIGNED_SIZE:
        raise UnusableFaceError(f"smaller than {ALIGNED_SIZE}x{ALIGNED_SIZE}")
    columns = {"detection_score": 1.0, "faces_found": 1}
    return SimpleNamespace(image=image, for_encoder=at_112, columns=columns)


def prepare_faces(
    source: str | os.PathLike,
    output: str | os.PathLike,
    encoder: FaceEncoder,
    image_size: int = 128,
    face: str = "largest",
    aligned: bool = False,
    identities: list[str] | None = None,
    min_images: int = 1,
    outlier_threshold: float = 0.2,
    drop_outliers: bool = False,
    min_in_frame: float | None = None,
    threads: int = 1,
) -> dict:
    """Aligns and embeds photographs into a cache. Goes on where an earlier call was stopped.

    Args:
        source: a folder `ROOT/IDENTITY/*.jpg`, InsightFace's RecordIO (`train.rec`) or webdataset shards (`*.tar`);
            see `open_source`.
        output: the cache's folder.
        encoder: detects and embeds.
        image_size (`int`, defaults to 128): side of the stored faces in pixels.
        face (`str`, defaults to `"largest"`): which of several faces: `"largest"` or `"central"`.
        aligned (`bool`, defaults to `False`): the pictures are faces already aligned to the 112x112 template, of at
            least that size: no detection.
        identities (`list[str]`, *optional*): only these identities.
        min_images (`int`, defaults to 1): leave out identities with fewer photographs.
        outlier_threshold (`float`, defaults to 0.2): a face is an outlier when the cosine of its embedding to the
            median of its identity's embeddings (of three or more) is below it: often another person's.
        drop_outliers (`bool`, defaults to `False`): leave them out. They are reported in any case. A later call may
            drop what was kept, or take another threshold, as long as nothing was dropped.
        min_in_frame (`float`, *optional*): skip faces of whose 112x112 template less than this share lies within the
            photograph: the rest of the aligned face is black.
        threads (`int`, defaults to 1): photographs that are read, detected and aligned at the same time. The cache
            does not depend on it. Give an encoder with `threads=1`, so that they do not wait for each other.

    Returns:
        The report: `photographs`, `faces`, `identities`, `reasons` (one count per reason), `skipped` (file -> reason),
        `several_faces` (file -> how many were found, if more than one), `duplicates` (file -> the first file with
        the same pixels), `outliers` (file -> cosine) and `left_out` (of what was found beside the photographs:
        reason -> `count`, and the `first` ten names). Of the faces: `poses_known` (how many have a head pose; those
        of aligned pictures have none), `side_views` (how many of these look sideways, |yaw| > 0.25) and
        `in_frame_below` (0.9, 0.7, 0.5 -> of how many less of the template lies within the photograph).

    Raises:
        ValueError: nothing to prepare, no face in any photograph, or `output` was begun with other settings or by a
            version that did not keep head poses.
    """
    if face not in SELECTIONS:
        raise ValueError(f"`face` has to be one of {SELECTIONS} but is {face!r}.")
    if min_in_frame is not None and not 0 <= min_in_frame <= 1:
        raise ValueError(f"`min_in_frame` is a share from 0 to 1, not {min_in_frame}.")
    if min_in_frame and aligned:
        raise ValueError(
            "`min_in_frame` (--min-in-frame) needs photographs: where faces are aligned already (--aligned), their"
            " photograph's edges are not known."
        )
    _arrow_schema()  # what is not installed is named before the work
    output = local_path(output)
    photographs = open_source(source, identities, min_images)
    total = len(photographs.photographs)
    if (output / GENERATION).exists() or output.resolve() == local_path(source).resolve():
        raise ValueError(f"{output} is a data set, not a cache of faces: choose another folder for --output.")
    settings = {"identity_encoder": encoder.name, "image_size": image_size, "face": face, "aligned": aligned}
    settings |= {"det_size": encoder.det_size, "det_thresh": encoder.det_thresh}
    prints = {"identity_encoder_fingerprint": encoder.fingerprint}
    prints["detector_fingerprint"] = None if aligned else encoder.detector_fingerprint
    # as if it were not there in caches of earlier versions, which had no such limit
    settings |= {"min_in_frame": min_in_frame or None}
    settings |= {"photographs": total, "files": source_fingerprint(photographs, progress=True)}
    check_settings(output / "prepare.json", settings | prints, if_known=list(prints))

    shards = [output / f"faces-{number:05d}.parquet" for number in range(-(-total // SHARD_SIZE))]
    _check_same_columns(shards)
    with tqdm(total=total, unit="photo", desc="prepare") as progress:
        for number, shard in enumerate(shards):
            part = photographs.photographs[number * SHARD_SIZE : (number + 1) * SHARD_SIZE]
            if shard.exists():
                if _shard_rows(shard) + len(_shard_skipped(shard)) != len(part):
                    raise ValueError(f"{shard} does not hold the photographs of its shard: delete it.")
                progress.update(len(part))
            else:
                how = (encoder, image_size, face, aligned, min_in_frame)
                _write_shard(shard, photographs, part, *how, threads=threads, progress=progress)

    outliers = _find_outliers_once(output / "outliers.json", shards, outlier_threshold, drop_outliers)
    if drop_outliers:
        for shard in shards:
            _drop_rows(shard, outliers)

    skipped = {file: reason for shard in shards for file, reason in _shard_skipped(shard).items()}
    if len(skipped) == total:
        raise ValueError(f"none of {total} photographs gave a face: {dict(Counter(skipped.values()))}.")
    columns = ["file", "identity", "faces_found", "photograph_sha256"]
    rows = [row for shard in shards for row in _read_shard(shard, columns, POSE_COLUMNS).to_pylist()]
    yaws, outside = (np.array([row.get(name) for row in rows], float) for name in ("yaw", "out_of_frame"))
    first_with: dict[str, str] = {}
    duplicates = {}
    for row in rows:
        first = first_with.setdefault(row["photograph_sha256"], row["file"])
        if first != row["file"]:
            duplicates[row["file"]] = first
    report = {
        "photographs": total,
        "faces": len(rows),
        "identities": len({row["identity"] for row in rows}),
        # an outlier's reason goes on with its cosine
        "reasons": dict(Counter(reason.partition(":")[0] for reason in skipped.values())),
        "poses_known": int((~np.isnan(yaws)).sum()),
        "side_views": int((np.abs(yaws) > SIDE_VIEW).sum()),
        "in_frame_below": {str(share): int((1 - outside < share).sum()) for share in IN_FRAME},
        "several_faces": {row["file"]: row["faces_found"] for row in rows if row["faces_found"] > 1},
        "skipped": skipped,
        "duplicates": duplicates,
        "outliers": outliers,
        "left_out": summarize_left_out(photographs.left_out),
    }
    write_json(output / "report.json", report)
    return report


def _check_same_columns(shards: list[Path]) -> None:
    """
    Raises:
        ValueError: shards are to be added to those of an earlier version, which have fewer columns: `datasets` would
            not read them together.
    """
    there = [shard for shard in shards if shard.exists()]
    earlier = [shard for shard in there if not set(POSE_COLUMNS) <= set(_shard_columns(shard))]
    if earlier and len(there) < len(shards):
        raise ValueError(
            f"{earlier[0]} is of an earlier version, which did not keep head poses, and {len(shards) - len(there)} of"
            f" {len(shards)} shards are missing: choose another folder, or delete the {len(earlier)} shards without"
            " poses to prepare them again."
        )


def _write_shard(
    shard: Path,
    source: PhotographSource,
    photographs: list[Photograph],
    encoder: FaceEncoder,
    *settings,
    threads: int,
    progress: tqdm,
) -> None:
    """Prepares the photographs of one shard and writes it, with what was skipped in the metadata."""
    schema, rows, for_encoder, skipped = _arrow_schema(), [], [], {}
    reading = Lock()  # sources are not made for several threads

    def prepare(photograph: Photograph) -> tuple[dict, np.ndarray] | str:
        """Row and aligned face, or why it is skipped."""
        try:
            with reading:
                content = source.content(photograph)
            pixels = load_photograph(io.BytesIO(content))
            face = _prepare_photograph(pixels, encoder, *settings)
        except OSError as error:
            with reading:
                return unreadable_reason(source, photograph, error)
        except UnusableFaceError as error:
            return str(error)
        png = io.BytesIO()
        PIL.Image.fromarray(face.image).save(png, "png")
        row = {"image": {"bytes": png.getvalue(), "path": None}, **photograph._asdict(), **face.columns}
        return {**row, "photograph_sha256": hashlib.sha256(pixels.tobytes()).hexdigest()}, face.for_encoder

    with ThreadPoolExecutor(threads) if threads > 1 else nullcontext() as pool:
        found = (prepare(photograph) for photograph in photographs) if pool is None else pool.map(prepare, photographs)
        # closed, so that an interrupt does not wait for all of them
        with closing(found) as prepared:
            for photograph, result in zip(photographs, prepared, strict=True):
                progress.update()
                if isinstance(result, str):
                    skipped[photograph.file] = result
                else:
                    rows.append(result[0])
                    for_encoder.append(result[1])
        batches = [for_encoder[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
        # a GPU's memory has to hold one batch only
        embed = pool.map if pool is not None and encoder.runs_on_cpu else map
        features = list(embed(encoder.features, batches))
    embedded = []
    if rows:
        features = np.concatenate(features)
        usable = has_direction(features)
        skipped |= {row["file"]: "no embedding" for row, fine in zip(rows, usable, strict=True) if not fine}
        embeddings = features[usable] / np.linalg.norm(features[usable], axis=1, keepdims=True)
        kept = itertools.compress(rows, usable)
        embedded = [{**row, "embedding": embedding} for row, embedding in zip(kept, embeddings, strict=True)]
    metadata = {**(schema.metadata or {}), b"skipped": json.dumps(skipped).encode()}
    with complete_file(shard) as beside:
        pq.write_table(pa.Table.from_pylist(embedded, schema.with_metadata(metadata)), beside)


@contextmanager
def _naming(shard: Path) -> Iterator[None]:
    """Errors of a shard's content name it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk or the network
            raise
        raise ValueError(
            f"no parquet file: {why_unreadable(shard, error)}. Or delete it and run `uiface prepare` again."
        ) from error


def _read_shard(shard: Path, columns: list[str] | None = None, if_there: Sequence[str] = ()) -> pa.Table:
    """All columns of a shard, or some, and those of `if_there` that it has."""
    if if_there:
        there = _shard_columns(shard)
        columns = [*(columns or []), *(name for name in if_there if name in there)]
    with _naming(shard):
        # a file object: pyarrow would take a path for a pattern or an address
        with open(shard, "rb") as file:
            return pq.read_table(file, columns=columns)


def _shard_rows(shard: Path) -> int:
    with _naming(shard):
        return pq.read_metadata(shard).num_rows


def _shard_columns(shard: Path) -> list[str]:
    with _naming(shard):
        return pq.read_schema(shard).names


def _shard_skipped(shard: Path) -> dict[str, str]:
    with _naming(shard):
        return json.loads((pq.read_schema(shard).metadata or {}).get(b"skipped", b"{}"))


def find_outliers(shards: list[Path], threshold: float) -> dict[str, float]:
    """Faces whose embedding has a cosine below `threshold` to the (componentwise) median of its identity's, file ->
    cosine; identities of three or more faces."""
    tables = [_read_shard(shard, ["file", "identity", "embedding"]) for shard in shards]
    table = pa.concat_tables(tables).to_pandas()
    outliers = {}
    for _, faces in table.groupby("identity", sort=True):
        if len(faces) < LEAST_FOR_MEDIAN:
            continue
        embeddings = np.stack(faces["embedding"])
        median = np.median(embeddings, axis=0)
        cosines = embeddings @ median / np.linalg.norm(median)
        outliers |= {file: round(float(c), 4) for file, c in zip(faces["file"], cosines, strict=True) if c < threshold}
    return outliers


def _find_outliers_once(file: Path, shards: list[Path], threshold: float, drop: bool) -> dict[str, float]:
    """The outliers, noted in `file` before any is dropped: afterward medians would be others."""
    if file.exists():
        dropped, earlier, outliers = read_entries(file, dropped=bool, threshold=int | float, outliers=dict)
        if dropped and (not drop or earlier != threshold):
            raise ValueError(
                f"{file.parent} was left without its outliers below {earlier}: choose another folder to keep them, or"
                " for another threshold."
            )
        if dropped:
            return outliers
    outliers = find_outliers(shards, threshold)
    write_json(file, {"threshold": threshold, "dropped": drop, "outliers": outliers})
    return outliers


def _drop_rows(shard: Path, outliers: dict[str, float]) -> None:
    """Moves outliers from a shard's rows to what it skipped."""
    table = _read_shard(shard)
    files = table["file"].to_pylist()
    dropped = [file for file in files if file in outliers]
    if not dropped:
        return
    reasons = {file: f"outlier: cosine {outliers[file]:.4f} to its identity's median" for file in dropped}
    metadata = {**table.schema.metadata, b"skipped": json.dumps(_shard_skipped(shard) | reasons).encode()}
    kept = table.filter(pa.array([file not in outliers for file in files]))
    with complete_file(shard) as beside:
        pq.write_table(kept.replace_schema_metadata(metadata), beside)


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
        self.shards = [shard for shard in shards if self.shard_length(shard)]
        (expected,) = read_entries(self.folder / "report.json", faces=int)
        if len(self) != expected:
            raise ValueError(
                f"{self.folder} has {len(self)} faces, its report.json says {expected}: files are missing, or"
                " `uiface prepare` is at work on it. Run that again, or copy the folder anew."
            )

    def __len__(self) -> int:
        return sum(self.shard_length(shard) for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the settings and the shards' sizes: the same for a copy, another one for a
        cache of other photographs or by another encoder, without reading the faces."""
        shards = [[shard.name, shard.stat().st_size, self.shard_length(shard)] for shard in self.shards]
        return hashlib.sha256(json.dumps([self.settings, shards], sort_keys=True).encode()).hexdigest()[:12]

    @staticmethod
    def shard_length(shard: Path) -> int:
        return _shard_rows(shard)

    @property
    def encoder_mark(self) -> EncoderMark:
        """By which its embeddings are told from another encoder's."""
        return EncoderMark(self.identity_encoder, self.identity_encoder_fingerprint)

    def embeddings(self) -> IdentityBank:
        """One embedding per face, `(N, identity_dim)`, in the order of `images`; the names are the identities'."""
        columns = [_read_shard(shard, ["embedding", "identity"]) for shard in self.shards]
        table = pa.concat_tables(columns)
        embeddings = np.stack(table["embedding"].to_numpy())
        names, mark = table["identity"].to_pylist(), self.encoder_mark
        return IdentityBank(torch.from_numpy(embeddings), mark.name, names, mark.fingerprint)

    def poses(self) -> np.ndarray:
        """Yaw and pitch of each face (see `head_pose`), `(N, 2)` float32, in the order of `embeddings`. NaN where they
        are not known: of pictures that were aligned already, and in caches of earlier versions."""
        tables = [_read_shard(shard, ["file"], if_there=("yaw", "pitch")).to_pandas() for shard in self.shards]
        tables = [table.reindex(columns=["yaw", "pitch"]) for table in tables]
        return np.concatenate([table.to_numpy(np.float32) for table in tables])

    def images(self, positions: Sequence[int]) -> list[np.ndarray]:
        """The faces at some positions, in the order of `embeddings`."""
        wanted, found, offset = set(positions), {}, 0
        for shard in self.shards:
            length = self.shard_length(shard)
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
            yield from pool.map(decode, _read_shard(shard, ["image"])["image"].to_pylist())


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


class FaceCacheSource:
    """The faces of a cache as a `PhotographSource`: each under its identity and its photograph's file."""

    def __init__(self, folder: str | os.PathLike):
        self.photographs, self.left_out, self._places, self._pictures = [], {}, {}, None
        cache = FaceCache(folder)
        self._shards = cache.shards
        for entry in sorted(cache.folder.iterdir()):
            if entry.name not in FILES and not entry.match("faces-*.parquet") and not entry.match("latents-*"):
                self.left_out[printable(entry.name)] = HIDDEN if is_system_entry(entry.name) else "beside the cache"
        for shard in self._shards:
            for row in _read_shard(shard, ["identity", "file"]).to_pylist():
                self._places[row["file"]] = (shard, len(self.photographs))
                self.photographs.append(Photograph(row["identity"], row["file"]))

    def read(self, photograph: Photograph) -> np.ndarray:
        return load_photograph(io.BytesIO(self.content(photograph)))

    def content(self, photograph: Photograph) -> bytes:
        if self._pictures is None:
            self._pictures = load_pictures(self._shards, decode=False)
        return self._pictures[self._places[photograph.file][1]]["image"]["bytes"]

    def stamp(self, photograph: Photograph) -> str:
        # the shard's: a face's own would have to be read
        return str(self._places[photograph.file][0].stat().st_size)
