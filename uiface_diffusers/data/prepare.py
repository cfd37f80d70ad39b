"""Photographs -> aligned and embedded faces in parquet shards, once, for all trainers. `FaceCache` reads them."""

import hashlib
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ..faces import (
    ALIGNED_SIZE,
    SELECTIONS,
    SIDE_VIEW,
    PhotographEncoder,
    UnusableFaceError,
    align_face,
    has_direction,
    head_pose,
    out_of_frame,
    resize_aligned,
    template_landmarks,
)
from ..files import check_settings, complete_file, local_path, read_entries, write_json
from ..pictures import load_photograph
from .face_cache import read_shard, shard_columns, shard_rows, shard_skipped
from .image_folder import GENERATION
from .photographs import Photograph, PhotographSource, source_fingerprint, summarize_left_out, unreadable_reason
from .sources import open_source

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


class _Prepared(NamedTuple):
    """A face at the size of the cache and at the encoder's, and what else the cache keeps of it."""

    image: np.ndarray
    for_encoder: np.ndarray
    columns: dict[str, Any]


@dataclass(frozen=True)
class _Preparation:
    """From a photograph to a face, by the settings of `prepare_faces`.

    Raises:
        ValueError: a setting is out of its range, or does not go with another.
    """

    encoder: PhotographEncoder
    image_size: int
    face: str
    aligned: bool
    min_in_frame: float | None

    def __post_init__(self) -> None:
        if self.face not in SELECTIONS:
            raise ValueError(f"`face` has to be one of {SELECTIONS} but is {self.face!r}.")
        if self.min_in_frame is not None and not 0 <= self.min_in_frame <= 1:
            raise ValueError(f"`min_in_frame` is a share from 0 to 1, not {self.min_in_frame}.")
        if self.min_in_frame and self.aligned:
            raise ValueError(
                "`min_in_frame` (--min-in-frame) needs photographs: where faces are aligned already (--aligned), their"
                " photograph's edges are not known."
            )

    def __call__(self, photograph: np.ndarray) -> _Prepared:
        """
        Raises:
            UnusableFaceError: what makes the photograph unusable.
        """
        if self.aligned:
            image, at_112 = resize_aligned(photograph, self.image_size), resize_aligned(photograph)
            if len(photograph) < ALIGNED_SIZE:
                raise UnusableFaceError(f"smaller than {ALIGNED_SIZE}x{ALIGNED_SIZE}")
            return _Prepared(image, at_112, {"detection_score": 1.0, "faces_found": 1})
        faces = self.encoder.detect(photograph)
        found = self.encoder.select(faces, photograph.shape, self.face)
        outside = out_of_frame(found.landmarks, photograph.shape)
        if 1 - outside < (self.min_in_frame or 0):
            raise UnusableFaceError(f"out of frame: {1 - outside:.3f} of the template is within the photograph")
        yaw, pitch = head_pose(found.landmarks)
        columns: dict[str, Any] = {"detection_score": found.score, "faces_found": len(faces)}
        columns |= {"landmarks": template_landmarks(found.landmarks).ravel()}
        columns |= {"yaw": yaw, "pitch": pitch, "out_of_frame": outside}
        image, at_112 = (align_face(photograph, found.landmarks, size) for size in (self.image_size, ALIGNED_SIZE))
        return _Prepared(image, at_112, columns)

    def settings(self) -> tuple[dict[str, Any], dict[str, str | None]]:
        """What the cache depends on; and the weights, which earlier versions did not name."""
        encoder = self.encoder
        settings = {"identity_encoder": encoder.name, "image_size": self.image_size, "face": self.face}
        settings |= {"aligned": self.aligned, "det_size": encoder.det_size, "det_thresh": encoder.det_thresh}
        # as if it were not there in caches of earlier versions, which had no such limit
        settings |= {"min_in_frame": self.min_in_frame or None}
        prints = {"identity_encoder_fingerprint": encoder.fingerprint}
        return settings, prints | {"detector_fingerprint": None if self.aligned else encoder.detector_fingerprint}


def prepare_faces(
    source: str | os.PathLike,
    output: str | os.PathLike,
    encoder: PhotographEncoder,
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
        source: of any form that `open_source` opens.
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
    preparation = _Preparation(encoder, image_size, face, aligned, min_in_frame)
    _arrow_schema()  # what is not installed is named before the work
    output = local_path(output)
    photographs = open_source(source, identities, min_images)
    total = len(photographs.photographs)
    if (output / GENERATION).exists() or output.resolve() == local_path(source).resolve():
        raise ValueError(f"{output} is a data set, not a cache of faces: choose another folder for --output.")
    settings, prints = preparation.settings()
    settings |= {"photographs": total, "files": source_fingerprint(photographs, progress=True)}
    check_settings(output / "prepare.json", settings | prints, if_known=list(prints))

    shards = [output / f"faces-{number:05d}.parquet" for number in range(-(-total // SHARD_SIZE))]
    _check_same_columns(shards)
    with tqdm(total=total, unit="photo", desc="prepare") as progress:
        for number, shard in enumerate(shards):
            part = photographs.photographs[number * SHARD_SIZE : (number + 1) * SHARD_SIZE]
            if not shard.exists():
                _write_shard(shard, photographs, part, preparation, threads, progress)
            elif shard_rows(shard) + len(shard_skipped(shard)) == len(part):
                progress.update(len(part))
            else:
                raise ValueError(f"{shard} does not hold the photographs of its shard: delete it.")

    outliers = _find_outliers_once(output / "outliers.json", shards, outlier_threshold, drop_outliers)
    if drop_outliers:
        for shard in shards:
            _drop_rows(shard, outliers)
    report = _report(shards, total, outliers, photographs.left_out)
    write_json(output / "report.json", report)
    return report


def _report(shards: list[Path], total: int, outliers: dict[str, float], left_out: Mapping[str, str]) -> dict[str, Any]:
    """
    Raises:
        ValueError: there is no face in any photograph.
    """
    skipped = {file: reason for shard in shards for file, reason in shard_skipped(shard).items()}
    if len(skipped) == total:
        raise ValueError(f"none of {total} photographs gave a face: {dict(Counter(skipped.values()))}.")
    columns = ["file", "identity", "faces_found", "photograph_sha256"]
    rows = [row for shard in shards for row in read_shard(shard, columns, POSE_COLUMNS).to_pylist()]
    yaws, outside = (np.array([row.get(name) for row in rows], float) for name in ("yaw", "out_of_frame"))
    first_with: dict[str, str] = {}
    for row in rows:
        first_with.setdefault(row["photograph_sha256"], row["file"])
    firsts = {row["file"]: first_with[row["photograph_sha256"]] for row in rows}
    return {
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
        "duplicates": {file: first for file, first in firsts.items() if first != file},
        "outliers": outliers,
        "left_out": summarize_left_out(left_out),
    }


def _check_same_columns(shards: list[Path]) -> None:
    """
    Raises:
        ValueError: shards are to be added to those of an earlier version, which have fewer columns: `datasets` would
            not read them together.
    """
    there = [shard for shard in shards if shard.exists()]
    earlier = [shard for shard in there if not set(POSE_COLUMNS) <= set(shard_columns(shard))]
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
    preparation: _Preparation,
    threads: int,
    progress: tqdm,
) -> None:
    """Prepares the photographs of one shard and writes it, with what was skipped in the metadata."""
    encoder, rows, for_encoder = preparation.encoder, [], []
    skipped: dict[str, str] = {}
    reading = Lock()  # sources are not made for several threads

    def prepare(photograph: Photograph) -> tuple[dict[str, Any], np.ndarray] | str:
        """Row and aligned face, or why it is skipped."""
        try:
            with reading:
                content = source.content(photograph)
            pixels = load_photograph(io.BytesIO(content))
            face = preparation(pixels)
        except OSError as error:
            with reading:
                return unreadable_reason(source, photograph, error)
        except UnusableFaceError as error:
            return str(error)
        png = io.BytesIO()
        PIL.Image.fromarray(face.image).save(png, "png")
        row = {"image": {"bytes": png.getvalue(), "path": None}, **photograph._asdict(), **face.columns}
        return {**row, "photograph_sha256": hashlib.sha256(pixels.tobytes()).hexdigest()}, face.for_encoder

    with ThreadPoolExecutor(threads) as pool:
        # a generator is closed, so that an interrupt does not wait for all of them
        with closing(each for each in pool.map(prepare, photographs)) as prepared:
            for photograph, result in zip(photographs, prepared, strict=True):
                progress.update()
                if isinstance(result, str):
                    skipped[photograph.file] = result
                else:
                    rows.append(result[0])
                    for_encoder.append(result[1])
        batches = [for_encoder[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
        # a GPU's memory has to hold one batch only
        features = list((pool.map if encoder.runs_on_cpu else map)(encoder, batches))
    embedded = _with_embeddings(rows, np.concatenate(features), skipped) if rows else []
    schema = _arrow_schema()
    metadata = {**(schema.metadata or {}), b"skipped": json.dumps(skipped).encode()}
    with complete_file(shard) as beside:
        pq.write_table(pa.Table.from_pylist(embedded, schema.with_metadata(metadata)), beside)


def _with_embeddings(
    rows: list[dict[str, Any]], features: np.ndarray, skipped: dict[str, str]
) -> list[dict[str, Any]]:
    """The rows whose features `(N, D)` can be brought to unit length, with these; the others go to `skipped`."""
    usable = has_direction(features)
    skipped |= {row["file"]: "no embedding" for row, fine in zip(rows, usable, strict=True) if not fine}
    embeddings = features[usable] / np.linalg.norm(features[usable], axis=1, keepdims=True)
    kept = itertools.compress(rows, usable)
    return [{**row, "embedding": embedding} for row, embedding in zip(kept, embeddings, strict=True)]


def find_outliers(shards: list[Path], threshold: float) -> dict[str, float]:
    """Faces whose embedding has a cosine below `threshold` to the (componentwise) median of its identity's, file ->
    cosine; identities of three or more faces."""
    tables = [read_shard(shard, ["file", "identity", "embedding"]) for shard in shards]
    table = pa.concat_tables(tables).to_pandas()
    outliers: dict[str, float] = {}
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
    table = read_shard(shard)
    files = table["file"].to_pylist()
    dropped = [file for file in files if file in outliers]
    if not dropped:
        return
    reasons = {file: f"outlier: cosine {outliers[file]:.4f} to its identity's median" for file in dropped}
    metadata = {**table.schema.metadata, b"skipped": json.dumps(shard_skipped(shard) | reasons).encode()}
    kept = table.filter(pa.array([file not in outliers for file in files]))
    with complete_file(shard) as beside:
        pq.write_table(kept.replace_schema_metadata(metadata), beside)
