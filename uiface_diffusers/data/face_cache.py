"""A folder of identities -> aligned and embedded faces in parquet shards, once, for all trainers.

A cache holds `prepare.json` (the settings), `faces-NNNNN.parquet` (one shard for every 1,000 photographs of the sorted
list) and `report.json` (what was skipped, and why). `datasets.load_dataset("parquet", ...)` reads the shards.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from ..faces import ALIGNED_SIZE, SELECTIONS, FaceEncoder, UnusableFaceError, align_face, load_photograph
from ..files import complete_file
from ..identities import IdentityBank

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
SHARD_SIZE = 1000
BATCH_SIZE = 64


def list_photographs(
    source: str | os.PathLike, identities: list[str] | None = None, min_images: int = 1
) -> list[tuple[str, str]]:
    """Pairs of identity and file, relative to `source`, of a folder `ROOT/IDENTITY/*.jpg`, sorted.

    Args:
        identities: only these; all folders if not given.
        min_images: identities with fewer photographs are left out.

    Raises:
        ValueError: nothing is left, or an identity that was asked for has no folder.
    """
    source = Path(source)
    folders = {entry.name: entry for entry in source.iterdir() if entry.is_dir()} if source.is_dir() else {}
    if identities is not None:
        missing = sorted(set(identities) - folders.keys())
        if missing:
            raise ValueError(f"{len(missing)} identities have no folder in {source}, as `{missing[0]}`.")
        folders = {name: folders[name] for name in identities}
    photographs = []
    for name in sorted(folders):
        files = sorted(file.name for file in folders[name].iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if len(files) >= min_images:
            photographs += [(name, f"{name}/{file}") for file in files]
    if not photographs:
        raise ValueError(
            f"{source} has no photographs of the form IDENTITY/FILE with a suffix of {', '.join(IMAGE_SUFFIXES)}"
            + (f" and at least {min_images} of an identity." if min_images > 1 else ".")
        )
    return photographs


def _arrow_schema() -> pa.Schema:
    from datasets import Features, Image, Sequence, Value

    features = {
        "image": Image(),
        "identity": Value("string"),
        "file": Value("string"),
        "embedding": Sequence(Value("float32")),
        "detection_score": Value("float32"),
    }
    return Features(features).arrow_schema


def _write_json(path: Path, content: dict) -> None:
    with complete_file(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n")


def _check_settings(path: Path, settings: dict) -> None:
    """Refuses to go on in a folder that was begun with other settings."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(path, settings)
        return
    begun = json.loads(path.read_text())
    differing = [key for key in settings.keys() | begun.keys() if settings.get(key) != begun.get(key)]
    if differing:
        detail = "; ".join(f"{key}: {begun.get(key)!r} there, {settings.get(key)!r} now" for key in sorted(differing))
        raise ValueError(f"{path.parent} was begun with other settings ({detail}): choose another folder.")


def _prepare_photograph(
    path: Path, encoder: FaceEncoder, image_size: int, face: str, aligned: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    """Face at `image_size`, face at 112, detection score. Raises what makes a photograph unusable."""
    photograph = load_photograph(path)
    if not aligned:
        found = encoder.select(encoder.detect(photograph), photograph.shape, face)
        at_112 = align_face(photograph, found.landmarks)
        return align_face(photograph, found.landmarks, image_size), at_112, found.score
    if photograph.shape[0] != photograph.shape[1]:
        raise UnusableFaceError(f"not aligned: {photograph.shape[1]}x{photograph.shape[0]} is not square")
    if photograph.shape[0] < ALIGNED_SIZE:
        raise UnusableFaceError(f"smaller than {ALIGNED_SIZE}x{ALIGNED_SIZE}")
    picture = PIL.Image.fromarray(photograph)

    def resized(size: int) -> np.ndarray:
        return np.asarray(picture.resize((size, size), PIL.Image.Resampling.BILINEAR))

    return resized(image_size), resized(ALIGNED_SIZE), 1.0


def prepare_faces(
    source: str | os.PathLike,
    output: str | os.PathLike,
    encoder: FaceEncoder,
    image_size: int = 128,
    face: str = "largest",
    aligned: bool = False,
    identities: list[str] | None = None,
    min_images: int = 1,
) -> dict:
    """Aligns and embeds a folder of identities into a cache. Goes on where an earlier call was stopped.

    Args:
        source: `ROOT/IDENTITY/*.jpg`.
        output: the cache's folder.
        encoder: detects and embeds.
        image_size (`int`, defaults to 128): side of the stored faces in pixels.
        face (`str`, defaults to `"largest"`): which of several faces: `"largest"` or `"central"`.
        aligned (`bool`, defaults to `False`): the files are faces already aligned to the 112x112 template, of at least
            that size: no detection.
        identities (`list[str]`, *optional*): only these folders.
        min_images (`int`, defaults to 1): leave out identities with fewer photographs.

    Returns:
        The report: `photographs`, `faces`, `identities`, `reasons` (a count a reason) and `skipped` (file -> reason).

    Raises:
        ValueError: nothing to prepare, no face in any photograph, or `output` was begun with other settings.
    """
    if face not in SELECTIONS:
        raise ValueError(f"`face` has to be one of {SELECTIONS} but is {face!r}.")
    source, output = Path(source), Path(output)
    photographs = list_photographs(source, identities, min_images)
    files_hash = hashlib.sha256("\n".join(file for _, file in photographs).encode()).hexdigest()
    settings = {"identity_encoder": encoder.name, "image_size": image_size, "face": face, "aligned": aligned}
    settings |= {"det_size": encoder.det_size, "det_thresh": encoder.det_thresh}
    settings |= {"photographs": len(photographs), "files_sha256": files_hash}
    _check_settings(output / "prepare.json", settings)

    schema = _arrow_schema()
    skipped: dict[str, str] = {}
    with tqdm(total=len(photographs), unit="photo", desc="prepare") as progress:
        for start in range(0, len(photographs), SHARD_SIZE):
            shard = photographs[start : start + SHARD_SIZE]
            shard_path = output / f"faces-{start // SHARD_SIZE:05d}.parquet"
            if shard_path.exists():
                done = set(pq.read_table(shard_path, columns=["file"])["file"].to_pylist())
                metadata = pq.read_schema(shard_path).metadata or {}
                shard_skipped = json.loads(metadata.get(b"skipped", b"{}"))
                if len(done) + len(shard_skipped) != len(shard):
                    raise ValueError(f"{shard_path} does not hold the photographs of its shard: delete it.")
                progress.update(len(shard))
            else:
                prepare = partial(
                    _prepare_photograph, encoder=encoder, image_size=image_size, face=face, aligned=aligned
                )
                shard_skipped = _write_shard(shard_path, schema, source, shard, prepare, encoder, progress)
            skipped |= shard_skipped

    if len(skipped) == len(photographs):
        raise ValueError(f"none of {len(photographs)} photographs gave a face: {dict(Counter(skipped.values()))}.")
    kept = [identity for identity, file in photographs if file not in skipped]
    report = {
        "photographs": len(photographs),
        "faces": len(kept),
        "identities": len(set(kept)),
        "reasons": dict(Counter(skipped.values())),
        "skipped": skipped,
    }
    _write_json(output / "report.json", report)
    return report


def _write_shard(shard_path, schema, source, shard, prepare, encoder, progress) -> dict[str, str]:
    """Prepares the photographs of one shard and writes it; returns what was skipped, file -> reason."""
    rows, at_112, skipped = [], [], {}
    for identity, file in shard:
        try:
            progress.update()
            picture, for_encoder, score = prepare(source / file)
        except OSError:
            skipped[file] = "unreadable"
        except UnusableFaceError as error:
            skipped[file] = str(error)
        else:
            png = io.BytesIO()
            PIL.Image.fromarray(picture).save(png, "png")
            image = {"bytes": png.getvalue(), "path": None}
            rows.append({"image": image, "identity": identity, "file": file, "detection_score": score})
            at_112.append(for_encoder)
    for start in range(0, len(rows), BATCH_SIZE):
        embeddings = encoder.embed_aligned(at_112[start : start + BATCH_SIZE])
        for row, embedding in zip(rows[start : start + BATCH_SIZE], embeddings, strict=True):
            row["embedding"] = embedding
    metadata = {**(schema.metadata or {}), b"skipped": json.dumps(skipped).encode()}
    with complete_file(shard_path) as beside:
        pq.write_table(pa.Table.from_pylist(rows, schema.with_metadata(metadata)), beside)
    return skipped


class FaceCache:
    """Reads what `prepare_faces` wrote.

    Args:
        folder: the cache.

    Raises:
        ValueError: no cache, or an unfinished one.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not (self.folder / "report.json").exists():
            state = "is not finished" if (self.folder / "prepare.json").exists() else "is no cache of prepared faces"
            raise ValueError(f"{self.folder} {state}: run `uiface prepare` on it.")
        settings = json.loads((self.folder / "prepare.json").read_text())
        self.identity_encoder: str = settings["identity_encoder"]
        self.image_size: int = settings["image_size"]
        # a shard can hold nothing but skipped photographs
        shards = sorted(self.folder.glob("faces-*.parquet"))
        self.shards = [shard for shard in shards if self.shard_length(shard)]

    def __len__(self) -> int:
        return sum(self.shard_length(shard) for shard in self.shards)

    @staticmethod
    def shard_length(shard: Path) -> int:
        return pq.read_metadata(shard).num_rows

    def embeddings(self) -> IdentityBank:
        """One embedding a face, `(N, identity_dim)`, in the order of `images`; the names are the identities'."""
        columns = [pq.read_table(shard, columns=["embedding", "identity"]) for shard in self.shards]
        table = pa.concat_tables(columns)
        embeddings = np.stack(table["embedding"].to_numpy())
        return IdentityBank(torch.from_numpy(embeddings), self.identity_encoder, table["identity"].to_pylist())

    def shard_images(self, shard: Path) -> Iterator[np.ndarray]:
        """The faces of one shard, `(image_size, image_size, 3)` RGB bytes, one after the other."""
        for image in pq.read_table(shard, columns=["image"])["image"].to_pylist():
            yield np.asarray(PIL.Image.open(io.BytesIO(image["bytes"])).convert("RGB"))
