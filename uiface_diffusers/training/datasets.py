"""Faces to train on, fetched a batch at a time."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from ..data import FaceCache, LatentSet
from ..data.face_cache import load_pictures
from ..hub.lineage import CARD, read_header
from ..pictures import rgb_bytes
from ..seeds import mix_seed

# the stream of random numbers of a face's augmentation
AUGMENTATION = 1


def open_caches(folders: Sequence[str | os.PathLike]) -> list[FaceCache]:
    """Caches of `prepare_faces` that are trained on together.

    Raises:
        ValueError: one is no finished cache, or they differ in size.
    """
    caches = [FaceCache(folder) for folder in folders]
    sizes = {str(cache.folder): cache.image_size for cache in caches}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the caches differ in `image_size`: {sizes}. Prepare them alike.")
    return caches


def describe_caches(folders: Sequence[str | os.PathLike]) -> list[dict[str, Any]]:
    """The caches of a training, for `lineage.training_data` of the model's card: `name`, `faces`, `fingerprint`, and
    `license` where the header of FOLDER/README.md has one."""
    caches = [FaceCache(folder) for folder in folders]
    licenses = [read_header(cache.folder / CARD).get("license") for cache in caches]
    return [
        {"name": cache.folder.resolve().name, "faces": len(cache), "fingerprint": cache.fingerprint}
        | ({} if license is None else {"license": license})
        for cache, license in zip(caches, licenses, strict=True)
    ]


class LatentFaces(Dataset):
    """Latents of both flips `(2, C, h, w)` and identity embeddings; fetched a batch at a time."""

    def __init__(self, latents: LatentSet, embeddings: torch.Tensor):
        self.latents, self.embeddings = latents, embeddings

    def __len__(self) -> int:
        return len(self.latents)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.latents.__getitems__(indices), self.embeddings[indices]


class FacePictures(Dataset):
    """Faces of prepared caches, `(N, 3, size, size)` bytes; fetched a batch at a time.

    Raises:
        ValueError: the caches differ in size.
    """

    def __init__(self, folders: list[str]):
        caches = open_caches(folders)
        self.image_size = caches[0].image_size
        self.fingerprints = [cache.fingerprint for cache in caches]
        self.table = load_pictures([shard for cache in caches for shard in cache.shards])

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        pictures = [rgb_bytes(picture) for picture in self.table[indices]["image"]]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


class Augmentation:
    """Flips and crops a face by random numbers of its own, so that neither the number of workers nor an interruption
    changes them.

    Args:
        seed (`int`): of the training.
        image_size (`int`): of the faces, before and after.
        flip_probability (`float`): of mirroring.
        crop_probability (`float`): of a random resized crop.
        crop_scale (`tuple[float, float]`): least and largest share of the area that a crop keeps.
    """

    def __init__(
        self,
        seed: int,
        image_size: int,
        flip_probability: float,
        crop_probability: float,
        crop_scale: tuple[float, float],
    ):
        self.seed = seed
        crop = v2.RandomResizedCrop(image_size, scale=tuple(crop_scale), antialias=True)
        self.transform = v2.Compose(
            [v2.RandomHorizontalFlip(flip_probability), v2.RandomApply([crop], crop_probability)]
        )

    def __call__(self, face: torch.Tensor, number: int) -> torch.Tensor:
        """A face of `(3, image_size, image_size)` bytes; `number` is its place in the training."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, number, AUGMENTATION))
            return self.transform(face)
