"""Aligned faces and the numbers of their identities: what a face recognizer is trained on."""

import hashlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..faces import ALIGNED_SIZE, UnusableFaceError, load_photograph, resize_aligned
from ..files import local_path
from .face_cache import FaceCacheSource
from .image_folder import GENERATION
from .sources import (
    Photograph,
    describe_left_out,
    open_source,
    source_fingerprint,
    summarize_left_out,
    unreadable_reason,
)

logger = logging.getLogger(__name__)

# a picture whose channels each vary by less, of 255, shows nothing
UNIFORM_RANGE = 16
# more of them than this share, and something went wrong where the pictures were made
MAX_UNIFORM_SHARE = 0.01
UNIFORM = "of one color"


def decode_face(content: bytes, size: int) -> np.ndarray:
    """Reads an aligned face as `(size, size, 3)` RGB bytes, whatever its mode; nothing is resized.

    Raises:
        OSError: it cannot be read.
        UnusableFaceError: it is of another size.
    """
    face = load_photograph(io.BytesIO(content))
    if face.shape[:2] != (size, size):
        raise UnusableFaceError(f"{face.shape[1]}x{face.shape[0]}, not {size}x{size}")
    return face


def _data_set(path: str | os.PathLike) -> Path:
    """The folder of a data set whose part `path` may be: its images, its shards, its record file."""
    path = local_path(path).resolve()
    if path.suffix == ".rec" and path.is_file():
        return path.parent if path.name == "train.rec" or list(path.parent.glob("*.rec")) == [path] else path
    return path.parent if path.name in ("images", "shards", "data") and (path.parent / GENERATION).exists() else path


class LabeledFaces(Dataset):
    """Faces of one or several data sets, decoded when they are fetched, a batch at a time.

    Args:
        paths: of `open_source`. People of two data sets are two, whatever their names.
        image_size (`int`, defaults to 112): height and width of all faces. Those of a cache of `prepare_faces` are
            resized to it, all others have to have it.
        min_images (`int`, defaults to 1): identities with fewer faces are left out.
        transform (*optional*): called with each face, `(3, image_size, image_size)` bytes, and its number in the
            training; gives a face of the same form.

    Raises:
        ValueError: a data set is missing, unfinished or given twice, or there are fewer than two identities.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike],
        image_size: int = ALIGNED_SIZE,
        min_images: int = 1,
        transform: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    ):
        resolved = [_data_set(path) for path in paths]
        twice = [path for path, number in Counter(resolved).items() if number > 1]
        if twice:
            raise ValueError(f"{twice[0]} is given twice: its people would be two of each.")
        self.paths, self.image_size, self.transform = list(paths), image_size, transform
        self.sources = [open_source(path, min_images=min_images) for path in paths]
        for path, source in zip(paths, self.sources, strict=True):
            for line in describe_left_out(summarize_left_out(source.left_out)):
                logger.warning("left out of %s: %s", path, line)
        # where each source's faces begin
        self.starts = np.cumsum([0] + [len(source.photographs) for source in self.sources])
        names = [(i, face.identity) for i, source in enumerate(self.sources) for face in source.photographs]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        self.num_identities = len(numbers)
        self.labels = torch.tensor([numbers[name] for name in names])
        if self.num_identities < 2:
            raise ValueError(f"{', '.join(map(str, paths))}: {len(names)} faces of one identity, two are needed.")

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits: other faces, other people or other sizes of files, another fingerprint."""
        parts = [source_fingerprint(source) for source in self.sources]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    def _find(self, index: int) -> tuple[int, Photograph]:
        source = int(np.searchsorted(self.starts, index, side="right")) - 1
        return source, self.sources[source].photographs[index - self.starts[source]]

    def name(self, index: int) -> str:
        """The file, by its data set."""
        source, photograph = self._find(index)
        return f"{self.paths[source]}: {photograph.file}"

    def face(self, index: int) -> np.ndarray:
        """`(image_size, image_size, 3)` RGB bytes.

        Raises:
            UnusableFaceError: it cannot be trained on.
        """
        number, photograph = self._find(index)
        source = self.sources[number]
        try:
            if isinstance(source, FaceCacheSource):
                return resize_aligned(source.read(photograph), self.image_size)
            return decode_face(source.content(photograph), self.image_size)
        except OSError as error:
            raise UnusableFaceError(unreadable_reason(source, photograph, error)) from error

    def flaw(self, index: int) -> str | None:
        """What is wrong with a face, if anything is."""
        try:
            face = self.face(index)
        except UnusableFaceError as error:
            return str(error)
        # a sixteenth of the pixels tells it: looking at all takes longer than decoding
        return UNIFORM if np.ptp(face[::4, ::4], axis=(0, 1)).max() < UNIFORM_RANGE else None

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            keys: position in the data set and number in the training of each face.

        Returns:
            Faces `(batch, 3, image_size, image_size)` in bytes and labels `(batch,)`.

        Raises:
            ValueError: a face cannot be trained on; the message names the file.
        """
        faces = []
        for index, number in keys:
            try:
                face = torch.tensor(self.face(index)).permute(2, 0, 1)
            except UnusableFaceError as error:
                raise ValueError(f"{self.name(index)} is {error}.") from error
            faces.append(face if self.transform is None else self.transform(face, number))
        return torch.stack(faces), self.labels[[index for index, _ in keys]]


class _Flaws(Dataset):
    """`LabeledFaces.flaw` for a DataLoader."""

    def __init__(self, faces: LabeledFaces):
        self.faces = faces

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> str | None:
        return self.faces.flaw(index)


def check_faces(faces: LabeledFaces, max_faces: int | None = None, num_workers: int = 0) -> dict[str, int]:
    """Reads faces before a training does, so that it does not end after hours for one of them.

    Args:
        faces: all of them are of one size and RGB, or it is an error.
        max_faces (`int`, *optional*): read only so many, spread over the data set.
        num_workers (`int`, defaults to 0): processes that read.

    Returns:
        `faces`, `identities`, `single` (identities with one face), `checked` and `uniform` (faces of one color).

    Raises:
        ValueError: faces that cannot be trained on, or too many of one color; kinds, numbers and an example of each.
    """
    number = len(faces) if max_faces is None else min(max_faces, len(faces))
    indices = np.linspace(0, len(faces) - 1, number).round().astype(int).tolist()
    loader = DataLoader(_Flaws(faces), batch_size=64, sampler=indices, num_workers=num_workers, collate_fn=list)
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    remaining = iter(indices)
    with tqdm(total=number, desc="check", unit="face") as progress:
        for flaws in loader:
            for flaw in flaws:
                index = next(remaining)
                if flaw is not None:
                    counts[flaw] += 1
                    examples.setdefault(flaw, faces.name(index))
            progress.update(len(flaws))
    uniform = counts[UNIFORM]
    if uniform <= MAX_UNIFORM_SHARE * number:
        counts.pop(UNIFORM, None)
    if counts.total():
        kinds = "; ".join(f"{count} {flaw}, as {examples[flaw]}" for flaw, count in counts.most_common())
        raise ValueError(f"{counts.total()} of {number} faces cannot be trained on: {kinds}.")
    single = int((torch.bincount(faces.labels) == 1).sum())
    sizes = {"faces": len(faces), "identities": faces.num_identities, "single": single}
    return {**sizes, "checked": number, "uniform": uniform}
