"""Real people whose photographs a pipeline is conditioned on, to compare its faces with theirs."""

import os
from collections.abc import Collection, Sequence

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from ..data.face_cache import FaceCache
from ..encoders import check_same_encoder, common_encoder
from ..identities import IdentityBank, largest_cosines


class People:
    """The faces of caches of `uiface prepare`.

    Args:
        folders: the caches, all of one encoder.

    Raises:
        ValueError: their embeddings are of two encoders, or two folders have one name, by which people are told apart.
    """

    def __init__(self, folders: Sequence[str | os.PathLike]):
        self.caches = [FaceCache(folder) for folder in folders]
        mark = common_encoder({str(cache.folder): cache.encoder_mark for cache in self.caches})
        folder_names = [cache.folder.resolve().name for cache in self.caches]
        if len(set(folder_names)) < len(folder_names):
            folders = ", ".join(str(cache.folder) for cache in self.caches)
            raise ValueError(f"two of the caches {folders} have one name: rename a folder.")
        banks = [cache.embeddings() for cache in self.caches]
        names = [f"{folder}/{name}" for folder, bank in zip(folder_names, banks, strict=True) for name in bank.names]
        self.bank = IdentityBank(torch.cat([bank.embeddings for bank in banks]), mark.name, names, mark.fingerprint)

    def near(self, known: IdentityBank, min_cosine: float) -> list[str]:
        """Names of those with a face whose cosine to a known embedding of the same encoder is at least `min_cosine`:
        the same people under other names, mostly.

        Raises:
            ValueError: the known ones are of another encoder.
        """
        check_same_encoder("the prepared data", self.bank.encoder_mark, "the known bank", known.encoder_mark)
        cosines, _ = largest_cosines(F.normalize(self.bank.embeddings), F.normalize(known.embeddings))
        near = (cosines >= min_cosine).nonzero().flatten().tolist()
        return list(dict.fromkeys(self.bank.names[position] for position in near))

    def choose(self, number: int, without: Collection[str] = ()) -> list[int]:
        """Positions of the first face of `number` people, spread evenly over all but some.

        Raises:
            ValueError: there are fewer.
        """
        first: dict[str, int] = {}
        for position, name in enumerate(self.bank.names):
            first.setdefault(name, position)
        left_out = set(without)
        positions = [position for name, position in sorted(first.items()) if name not in left_out]
        if number > len(positions):
            folders = ", ".join(str(cache.folder) for cache in self.caches)
            raise ValueError(f"{number} identities are asked for, {folders} has {len(positions)}.")
        return [positions[i * len(positions) // number] for i in range(number)]

    def one_photograph_each(
        self, number: int, without: Collection[str] = ()
    ) -> tuple[IdentityBank, list[PIL.Image.Image]]:
        """Embeddings and faces of the people that `choose` gives."""
        positions = self.choose(number, without)
        return self.bank.take(positions), self.pictures(positions)

    def pictures(self, positions: Sequence[int]) -> list[PIL.Image.Image]:
        """The faces at some positions of `bank`."""
        found: dict[int, np.ndarray] = {}
        offset = 0
        for cache in self.caches:
            inside = [position for position in positions if offset <= position < offset + len(cache)]
            images = cache.images([position - offset for position in inside])
            found |= dict(zip(inside, images, strict=True))
            offset += len(cache)
        return [PIL.Image.fromarray(found[position]) for position in positions]
