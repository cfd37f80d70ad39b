"""Features of all faces of a source, for the protocols that compare more than pairs."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tqdm import tqdm

from ..data.benchmarks import central_face
from ..data.photographs import (
    Photograph,
    PhotographSource,
    describe_left_out,
    source_fingerprint,
    summarize_left_out,
    unreadable_reason,
)
from ..faces import FaceEncoder, Recognizer, UnusableFaceError, has_direction, resize_aligned
from ..files import complete_file, open_safetensors, same_name
from .face_set import digest

BATCH_SIZE = 64
# photographs whose embeddings are kept in one file
KEPT_TOGETHER = 1024
# what a file keeps of an `EmbeddedSource` beside the features
KEPT = ("identities", "files", "digests", "skipped", "without_face")


def _embedded_batches(recognizer: Recognizer, faces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Features `(batch, D)` of faces and of their mirror images, added."""
    faces = iter(faces)
    while batch := list(islice(faces, BATCH_SIZE)):
        pixels = np.stack([resize_aligned(face, recognizer.image_size) for face in batch])
        yield recognizer(pixels) + recognizer(np.ascontiguousarray(pixels[:, :, ::-1]))


def embed_faces(recognizer: Recognizer, faces: Iterable[np.ndarray], total: int, description: str) -> np.ndarray:
    """Features of a face and of its mirror image, added, as verification measures them.

    Args:
        recognizer: as `load_recognizer` gives it.
        faces: `(112, 112, 3)` RGB bytes each.
        total (`int`): the most there can be.
        description (`str`): of the progress bar.

    Returns:
        `np.ndarray` of shape `(N, D)`: float32.

    Raises:
        ValueError: there are no faces.
    """
    features, count = np.empty((0, 0), np.float32), 0
    with tqdm(total=total, desc=description, unit="face") as progress:
        for rows in _embedded_batches(recognizer, faces):
            if not count:
                features = np.empty((total, rows.shape[1]), np.float32)
            features[count : count + len(rows)] = rows
            count += len(rows)
            progress.update(len(rows))
    if not count:
        raise ValueError(f"{description}: there are no faces.")
    return features[:count]


@dataclass
class EmbeddedSource:
    """
    Args:
        features (`np.ndarray` of shape `(N, D)`): of the faces that were taken, of any length.
        identities (`list[str]`): whose they are.
        files (`list[str]`): their photographs.
        digests (`list[str]`): of the photographs' pixels.
        skipped (`dict[str, str]`): file -> why there is no embedding of it.
        without_face (`list[str]`): files in which no face was found: the square about the center was taken.
        left_out (`dict[str, str]`): of the source.
    """

    features: np.ndarray
    identities: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    without_face: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """What was not taken as it is, in words."""
        without_face = dict.fromkeys(self.without_face, "without a face: the center was taken")
        return describe_left_out(summarize_left_out(self.left_out | self.skipped | without_face))


def embed_source(
    recognizer: Recognizer,
    source: PhotographSource,
    encoder: FaceEncoder | None,
    description: str,
    folder: Path | None = None,
) -> EmbeddedSource:
    """Aligns and embeds every photograph of a source. Of several faces the one nearest to the center is taken, of a
    photograph without one the square about its center, as `make_benchmark` does.

    Args:
        recognizer: as `load_recognizer` gives it.
        source: the photographs.
        encoder: detects faces; `None` for faces that are aligned to the 112x112 template already.
        description (`str`): of the progress bar.
        folder (*optional*): keeps what is done, so that the same call goes on where an earlier one was stopped.

    Raises:
        ValueError: no photograph gives an embedding, or a file in `folder` is damaged.
    """
    result = EmbeddedSource(np.empty((0, 0)), left_out=dict(source.left_out))
    photographs, count = source.photographs, 0
    kept = None if folder is None else folder / f"photographs-{_key(recognizer, source, encoder)}"
    with tqdm(total=len(photographs), desc=description, unit="photo") as progress:
        for start in range(0, len(photographs), KEPT_TOGETHER):
            block = photographs[start : start + KEPT_TOGETHER]
            file = None if kept is None else kept / f"{start // KEPT_TOGETHER:06d}.safetensors"
            if file is not None and file.exists():
                part = _read_part(file)
            else:
                part = _embed_part(recognizer, source, block, encoder, progress)
                if file is not None:
                    _keep_part(file, part)
            progress.update(start + len(block) - progress.n)
            if part.files:
                if not count:
                    result.features = np.empty((len(photographs), part.features.shape[1]), np.float32)
                result.features[count : count + len(part.files)] = part.features
                count += len(part.files)
            for name in ("identities", "files", "digests", "without_face"):
                getattr(result, name).extend(getattr(part, name))
            result.skipped |= part.skipped
    if not count:
        raise ValueError(f"{description}: no photograph gives an embedding.")
    result.features = result.features[:count]
    return result


def _key(recognizer: Recognizer, source: PhotographSource, encoder: FaceEncoder | None) -> str:
    """Twelve hexadecimal digits of all that the kept embeddings of a source depend on."""
    detection = None if encoder is None else (encoder.detector_fingerprint, encoder.det_size, encoder.det_thresh)
    return digest(recognizer.fingerprint, recognizer.image_size, detection, source_fingerprint(source), KEPT_TOGETHER)


def _embed_part(
    recognizer: Recognizer,
    source: PhotographSource,
    photographs: Sequence[Photograph],
    encoder: FaceEncoder | None,
    progress: tqdm,
) -> EmbeddedSource:
    """Some photographs of a source."""
    part = EmbeddedSource(np.empty((0, 0), np.float32))

    def faces() -> Iterator[np.ndarray]:
        for photograph in photographs:
            try:
                pixels = source.read(photograph)
                face, found = (resize_aligned(pixels), 1) if encoder is None else central_face(pixels, encoder)
            except OSError as error:
                part.skipped[photograph.file] = unreadable_reason(source, photograph, error)
                continue
            except UnusableFaceError as error:
                part.skipped[photograph.file] = str(error)
                continue
            if not found:
                part.without_face.append(photograph.file)
            part.identities.append(same_name(photograph.identity))
            part.files.append(photograph.file)
            part.digests.append(hashlib.sha256(pixels.tobytes()).hexdigest())
            yield face

    rows = []
    for batch in _embedded_batches(recognizer, faces()):
        rows.append(batch)
        progress.update(len(batch))
    if not rows:
        return part
    features = np.concatenate(rows)
    usable = has_direction(features)
    for position in np.flatnonzero(~usable)[::-1]:
        file = part.files[position]
        part.skipped[file] = "no embedding: zero or not finite"
        if file in part.without_face:
            part.without_face.remove(file)
        del part.files[position], part.identities[position], part.digests[position]
    part.features = np.ascontiguousarray(features[usable], np.float32)
    return part


def _keep_part(file: Path, part: EmbeddedSource) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {name: json.dumps(getattr(part, name)) for name in KEPT}
    with complete_file(file) as beside:
        save_file({"features": part.features}, beside, metadata)


def _read_part(file: Path) -> EmbeddedSource:
    try:
        with open_safetensors(file) as opened:
            metadata = opened.metadata() or {}
            features = opened.get_tensor("features").numpy()
        part = EmbeddedSource(features, **{name: json.loads(metadata[name]) for name in KEPT})
        if not len(features) == len(part.identities) == len(part.files) == len(part.digests):
            raise ValueError(f"{file} has {len(features)} features of {len(part.files)} photographs.")
    except (KeyError, SafetensorError) as error:
        raise ValueError(f"{file} is of another kind. Delete it, and it is computed again.") from error
    except ValueError as error:
        raise ValueError(f"{error} Delete it, and it is computed again.") from error
    return part
