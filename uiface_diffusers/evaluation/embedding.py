"""Features of all faces of a source, for the protocols that compare more than pairs."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from tqdm import tqdm

from ..data.benchmarks import central_face
from ..data.photographs import PhotographSource, describe_left_out, summarize_left_out, unreadable_reason
from ..faces import FaceEncoder, Recognizer, UnusableFaceError, has_direction, resize_aligned
from ..files import same_name

BATCH_SIZE = 64


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
    features, count, faces = np.empty((0, 0), np.float32), 0, iter(faces)
    with tqdm(total=total, desc=description, unit="face") as progress:
        while batch := list(islice(faces, BATCH_SIZE)):
            pixels = np.stack([resize_aligned(face, recognizer.image_size) for face in batch])
            rows = recognizer(pixels) + recognizer(np.ascontiguousarray(pixels[:, :, ::-1]))
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
    recognizer: Recognizer, source: PhotographSource, encoder: FaceEncoder | None, description: str
) -> EmbeddedSource:
    """Aligns and embeds every photograph of a source. Of several faces the one nearest to the center is taken, of a
    photograph without one the square about its center, as `make_benchmark` does.

    Args:
        recognizer: as `load_recognizer` gives it.
        source: the photographs.
        encoder: detects faces; `None` for faces that are aligned to the 112x112 template already.
        description (`str`): of the progress bar.

    Raises:
        ValueError: no photograph gives an embedding.
    """
    result = EmbeddedSource(np.empty((0, 0)), left_out=dict(source.left_out))

    def faces() -> Iterator[np.ndarray]:
        for photograph in source.photographs:
            try:
                pixels = source.read(photograph)
                face, found = (resize_aligned(pixels), 1) if encoder is None else central_face(pixels, encoder)
            except OSError as error:
                result.skipped[photograph.file] = unreadable_reason(source, photograph, error)
                continue
            except UnusableFaceError as error:
                result.skipped[photograph.file] = str(error)
                continue
            if not found:
                result.without_face.append(photograph.file)
            result.identities.append(same_name(photograph.identity))
            result.files.append(photograph.file)
            result.digests.append(hashlib.sha256(pixels.tobytes()).hexdigest())
            yield face

    features = embed_faces(recognizer, faces(), len(source.photographs), description)
    usable = has_direction(features)
    for position in np.flatnonzero(~usable)[::-1]:
        result.skipped[result.files[position]] = "no embedding: zero or not finite"
        del result.files[position], result.identities[position], result.digests[position]
    result.features = features if usable.all() else features[usable]
    if not len(result.features):
        raise ValueError(f"{description}: no photograph gives an embedding.")
    return result
