"""A data set of aligned faces in any published form, and figures of its faces that are computed once and kept."""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from ..data.sources import (
    Photograph,
    PhotographSource,
    describe_left_out,
    open_faces,
    source_fingerprint,
    summarize_left_out,
    unreadable_reason,
)
from ..faces import NoEmbeddingError, Recognizer, UnusableFaceError, resize_aligned, unit_embeddings
from ..files import complete_file, read_json, read_safetensors, write_json
from ..identities import IdentityBank
from ..pictures import to_unit_range

__all__ = ["FaceSet", "JoinedSource", "face_pixels", "open_faces"]


def face_pixels(faces: Sequence[np.ndarray]) -> torch.Tensor:
    """Square faces of any size, RGB bytes, as `(N, 3, 112, 112)` in [-1, 1], resized as `FaceEncoder.embed_pictures`
    does."""
    resized = np.stack([resize_aligned(face) for face in faces])
    return to_unit_range(torch.from_numpy(resized).permute(0, 3, 1, 2))


class JoinedSource:
    """Several sources as one. A file has the number of its source in front: `2/anna/0001.jpg`."""

    def __init__(self, sources: Sequence[PhotographSource]):
        self.photographs: list[Photograph] = []
        self.left_out: dict[str, str] = {}
        self._places: dict[str, tuple[PhotographSource, Photograph]] = {}
        for number, source in enumerate(sources, start=1):
            self.left_out |= {f"{number}/{name}": reason for name, reason in source.left_out.items()}
            for photograph in source.photographs:
                joined = photograph._replace(file=f"{number}/{photograph.file}")
                self._places[joined.file] = (source, photograph)
                self.photographs.append(joined)

    def read(self, photograph: Photograph) -> np.ndarray:
        source, own = self._places[photograph.file]
        return source.read(own)

    def content(self, photograph: Photograph) -> bytes:
        source, own = self._places[photograph.file]
        return source.content(own)

    def stamp(self, photograph: Photograph) -> str:
        source, own = self._places[photograph.file]
        return source.stamp(own)


class FaceSet:
    """Aligned faces with the names of their identities.

    Args:
        source: their pictures.
        photographs (*optional*): only these; all if not given.
        left_out (*optional*): files that were left out -> why.
    """

    def __init__(
        self,
        source: PhotographSource,
        photographs: Sequence[Photograph] | None = None,
        left_out: dict[str, str] | None = None,
    ):
        self.source, self.left_out = source, left_out or {}
        self.photographs = list(source.photographs if photographs is None else photographs)
        self.names = [photograph.identity for photograph in self.photographs]
        # twelve hexadecimal digits: other faces, another key
        self.key = source_fingerprint(source, self.photographs)[:12]

    def __len__(self) -> int:
        return len(self.photographs)

    @property
    def images_of_each(self) -> str:
        """How many images the identities have, for people: `5`, or `2 to 7`."""
        counts = sorted(len(positions) for positions in self.identities.values())
        return f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"

    @property
    def left_out_of_source(self) -> str:
        """What the source found beside its photographs, in words; empty if there was nothing."""
        return "; ".join(describe_left_out(summarize_left_out(self.source.left_out)))

    @cached_property
    def identities(self) -> dict[str, list[int]]:
        """Name -> positions of its faces, in the order that the names come."""
        positions: dict[str, list[int]] = {}
        for position, name in enumerate(self.names):
            positions.setdefault(name, []).append(position)
        return positions

    @property
    def labels(self) -> torch.Tensor:
        """`(N,)`: the number of each face's identity, in the order of `identities`."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(self.names))}
        return torch.tensor([numbers[name] for name in self.names])

    @classmethod
    def join(cls, sets: Sequence["FaceSet"]) -> "FaceSet":
        """The faces of one or several sets, one set after the other. Names that are equal are one identity's."""
        if len(sets) == 1:
            return sets[0]
        photographs = [
            photograph._replace(file=f"{number}/{photograph.file}")
            for number, faces in enumerate(sets, start=1)
            for photograph in faces.photographs
        ]
        return cls(JoinedSource([faces.source for faces in sets]), photographs)

    def take(self, positions: Sequence[int]) -> "FaceSet":
        """The set of some of its faces."""
        return FaceSet(self.source, [self.photographs[position] for position in positions])

    def sample(self, number: int, seed: int = 0) -> "FaceSet":
        """At most so many of its faces, drawn uniformly without replacement, in their order."""
        if len(self) <= number:
            return self
        return self.take(np.sort(np.random.default_rng(seed).choice(len(self), number, replace=False)).tolist())

    def of_identities(self, names: Collection[str]) -> "FaceSet":
        """The faces of some identities, in their order."""
        return self.take([position for position, name in enumerate(self.names) if name in names])

    def sample_identities(self, max_faces: int, seed: int = 0) -> "FaceSet":
        """Whole identities, drawn uniformly, with at most so many faces in all; one at least."""
        names = list(self.identities)
        drawn: set[str] = set()
        total = 0
        for number in np.random.default_rng(seed).permutation(len(names)):
            total += len(self.identities[names[number]])
            if drawn and total > max_faces:
                break
            drawn.add(names[number])
        return self.of_identities(drawn)

    def read(self, position: int) -> PIL.Image.Image:
        """A face at 112x112, resized as `FaceEncoder.embed_pictures` does.

        Raises:
            OSError: it cannot be read.
            UnusableFaceError: it is not square, so not aligned.
        """
        return PIL.Image.fromarray(resize_aligned(self.source.read(self.photographs[position])))

    def pixels(self, positions: Sequence[int]) -> torch.Tensor:
        """Faces `(N, 3, 112, 112)` in [-1, 1]."""
        return face_pixels([self.source.read(self.photographs[position]) for position in positions])

    def embed(self, recognizer: Recognizer, folder: Path) -> torch.Tensor:
        """Embeddings `(N, D)` of unit length, in their order; `folder` keeps them.

        Raises:
            ValueError: a face has no usable embedding; the message names its file.
        """

        def compute(rows: range) -> torch.Tensor:
            try:
                return torch.from_numpy(unit_embeddings(recognizer, [np.asarray(self.read(row)) for row in rows]))
            except NoEmbeddingError as error:
                file = self.photographs[rows[error.position]].file
                raise ValueError(
                    f"`{recognizer.name}` gives no embedding of {file}: zero or not finite. Take the file out."
                ) from error

        folder = folder / f"embeddings-{recognizer.fingerprint}-{self.key}"
        return F.normalize(computed_once(folder, len(self), compute, f"embed by {recognizer.name}"))

    def bank(self, recognizer: Recognizer, folder: Path) -> IdentityBank:
        """Their embeddings with their names; as `embed`."""
        return IdentityBank(self.embed(recognizer, folder), recognizer.name, self.names, recognizer.fingerprint)

    def features(self, network: nn.Module | Recognizer, folder: Path, device: torch.device | str) -> torch.Tensor:
        """Features `(N, D)` by a module with a `name` on `device`, or embeddings; `folder` keeps them.

        Raises:
            ValueError: the features of a face are not finite; the message names its file.
        """
        if not isinstance(network, nn.Module):
            return self.embed(network, folder)
        network = network.to(device)

        def compute(rows: range) -> torch.Tensor:
            found = network(self.pixels(rows).to(device)).float().cpu()
            wrong = (~found.isfinite().all(dim=1)).nonzero().flatten().tolist()
            if wrong:
                file = self.photographs[rows[wrong[0]]].file
                raise ValueError(f"the features of {file} by {network.name} are not finite: is the backbone whole?")
            return found

        return computed_once(folder / f"features-{digest(network.name, self.key)}", len(self), compute, "features")

    def check(self, folder: Path) -> dict[str, str]:
        """Reads every picture, once: `folder` remembers it. Returns file -> what is wrong with it."""
        file = folder / f"checked-{self.key}.json"
        if file.exists():
            return read_json(file)
        wrong = {}
        for position, photograph in enumerate(tqdm(self.photographs, desc="check", unit="face")):
            try:
                self.read(position)
            except OSError as error:
                wrong[photograph.file] = unreadable_reason(self.source, photograph, error)
            except UnusableFaceError as error:
                wrong[photograph.file] = str(error)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, wrong)
        return wrong

    def without(self, files: dict[str, str]) -> "FaceSet":
        """The set without some files."""
        if not files:
            return self
        kept = [photograph for photograph in self.photographs if photograph.file not in files]
        return FaceSet(self.source, kept, left_out=files)

    def usable(self, path: str | os.PathLike, folder: Path, skip_unusable: bool = False) -> "FaceSet":
        """The set after a look at every picture.

        Args:
            path: where the set is, for the error.
            folder: remembers what was looked at.
            skip_unusable (`bool`, defaults to `False`): leave out pictures that cannot be used, in `left_out`.

        Raises:
            ValueError: pictures cannot be used, or none can.
        """
        unusable = self.check(folder)
        if unusable and not (skip_unusable and len(unusable) < len(self)):
            file, reason = next(iter(unusable.items()))
            raise ValueError(
                f"{len(unusable)} of {len(self)} pictures in {path} cannot be used, such as {file}: {reason}."
                " Photographs that are not aligned are made usable by `uiface prepare`; --skip-unusable of `uiface"
                " evaluate` leaves such pictures out."
            )
        return self.without(unusable)


def digest(*content: Any) -> str:
    """Twelve hexadecimal digits of anything that JSON can hold, for names of folders."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def computed_once(
    folder: Path,
    number: int,
    compute: Callable[[range], torch.Tensor],
    description: str,
    unit: str = "face",
    batch_size: int = 64,
    batches_a_file: int = 16,
) -> torch.Tensor:
    """Rows that are computed in batches and kept in files, some batches per file: the same call goes on where an
    earlier one was stopped.

    Args:
        folder: of the files; its name has to tell what is computed of what.
        number: rows.
        compute: gives the rows of a range.
        description: of the progress bar.

    Raises:
        ValueError: a file is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, size = [], batch_size * batches_a_file
    with tqdm(total=number, desc=description, unit=unit) as progress:
        for start in range(0, number, size):
            file, end = folder / f"{start // size:06d}.safetensors", min(start + size, number)
            if not file.exists():
                parts = []
                for first in range(start, end, batch_size):
                    parts.append(compute(range(first, min(first + batch_size, end))))
                    progress.update(len(parts[-1]))
                with complete_file(file) as beside:
                    save_file({"rows": torch.cat(parts).contiguous()}, beside)
            else:
                progress.update(end - start)
            try:
                kept = read_safetensors(file, ["rows"])["rows"]
                if len(kept) != end - start:
                    raise ValueError(f"{file} has {len(kept)} rows, not {end - start}.")
            except ValueError as error:
                raise ValueError(f"{error} Delete it, and it is computed again.") from error
            rows.append(kept)
    return torch.cat(rows)
