"""Faces to train on, fetched a batch at a time."""

import argparse
import logging
import os
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import v2

from ..data import FaceCache, LatentSet, cache_latents
from ..data.face_cache import load_pictures
from ..encoders import EncoderMark, common_encoder
from ..hub.lineage import CARD, read_header
from ..latents import FirstStage
from ..models import CONDITIONS, ConditionProjector
from ..pictures import rgb_bytes
from ..seeds import mix_seed
from .order import EndlessBatchSampler, sampling_weights

logger = logging.getLogger(__name__)
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
    """Latents of both flips `(2, C, h, w)`, identity embeddings, values of conditions, and the teacher's features of
    both flips `(2, locations, channels)` if `features` was set; fetched a batch at a time.

    Args:
        latents: of the faces.
        embeddings (`torch.Tensor` of shape `(N, identity_dim)`): of unit length.
        values: of each condition, `(N, fields)`.
    """

    def __init__(self, latents: LatentSet, embeddings: torch.Tensor, values: Sequence[torch.Tensor] = ()):
        self.latents, self.embeddings, self.values = latents, embeddings, values
        self.features: LatentSet | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, ...]:
        further = [each[indices] for each in self.values]
        further += [] if self.features is None else [self.features.__getitems__(indices)]
        return self.latents.__getitems__(indices), self.embeddings[indices], *further


def read_condition(projector: type[ConditionProjector], caches: Sequence[FaceCache]) -> torch.Tensor:
    """The values of a condition of all faces, `(N, fields)`; NaN where they are not known.

    Raises:
        ValueError: a cache has none.
    """
    found = [projector.from_columns(cache.columns(projector.columns)) for cache in caches]
    lacking = [str(c.folder) for c, each in zip(caches, found, strict=True) if np.isnan(each).any(axis=1).all()]
    if lacking:
        raise ValueError(
            f"--{projector.condition}-projector needs {' and '.join(projector.columns)} of the faces, which"
            f" {', '.join(lacking)} do not have: {projector.remedy}; or leave these caches out."
        )
    values = np.concatenate(found)
    unknown = int(np.isnan(values).any(axis=1).sum())
    if unknown:
        logger.warning(f"{unknown} of {len(values)} faces have no {projector.condition}: they train its absence")
    return torch.from_numpy(values)


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


class CropInPlace(nn.Module):
    """Keeps a random part of a face at its place; the rest becomes black (AdaFace, Kim et al., CVPR 2022)."""

    def __init__(self, scale: tuple[float, float]):
        super().__init__()
        self.scale = list(scale)

    def forward(self, face: torch.Tensor) -> torch.Tensor:
        top, left, height, width = transforms.RandomResizedCrop.get_params(face, self.scale, [3 / 4, 4 / 3])
        rows, columns = slice(top, top + height), slice(left, left + width)
        kept = torch.zeros_like(face)
        kept[:, rows, columns] = face[:, rows, columns]
        return kept


class LowResolution(nn.Module):
    """Makes a face smaller, to a fifth of its side or more, and as large as before, by two of OpenCV's five
    interpolations (AdaFace, Kim et al., CVPR 2022)."""

    SMALLEST = 0.2
    INTERPOLATIONS = (cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_AREA, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4)

    def forward(self, face: torch.Tensor) -> torch.Tensor:
        size = face.shape[-1]
        small = max(int(size * torch.empty(1).uniform_(self.SMALLEST, 1).item()), 1)
        picture = face.permute(1, 2, 0).numpy()
        for side, kind in zip((small, size), torch.randint(len(self.INTERPOLATIONS), (2,)).tolist(), strict=True):
            picture = cv2.resize(picture, (side, side), interpolation=self.INTERPOLATIONS[kind])
        return torch.from_numpy(picture).permute(2, 0, 1)


class Erasing(nn.Module):
    """Random erasing (Zhong et al., AAAI 2020): a rectangle of random place and form gets random bytes. Its area is 2
    to 40 % of the face, the ratio of its sides 0.3 to 1 / 0.3, as in the paper."""

    def forward(self, face: torch.Tensor) -> torch.Tensor:
        top, left, height, width, found = transforms.RandomErasing.get_params(face, (0.02, 0.4), (0.3, 1 / 0.3), [0.0])
        if found is face:  # no rectangle fitted in
            return face
        erased = face.clone()
        noise = torch.randint(256, (len(face), height, width), dtype=face.dtype)
        erased[:, top : top + height, left : left + width] = noise
        return erased


class Augmentation:
    """Changes a face by random numbers of its own, so that neither the number of workers nor an interruption changes
    them. In this order: mirrored, cropped, of low resolution, of other colors, partly erased. Without the options, no
    random numbers are drawn for the last three.

    Args:
        seed (`int`): of the training.
        image_size (`int`): of the faces, before and after.
        flip_probability (`float`): of mirroring.
        crop_probability (`float`): of a random resized crop.
        crop_scale (`tuple[float, float]`): least and largest share of the area that a crop keeps.
        crop_in_place (`bool`, defaults to `False`): a crop is not resized, see `CropInPlace`.
        low_resolution_probability (`float`, defaults to 0.0): of `LowResolution`.
        photometric_probability (`float`, defaults to 0.0): of changing brightness, contrast and saturation by up to a
            half (AdaFace, Kim et al., CVPR 2022).
        erasing_probability (`float`, defaults to 0.0): of `Erasing`.
    """

    def __init__(
        self,
        seed: int,
        image_size: int,
        flip_probability: float,
        crop_probability: float,
        crop_scale: tuple[float, float],
        crop_in_place: bool = False,
        low_resolution_probability: float = 0.0,
        photometric_probability: float = 0.0,
        erasing_probability: float = 0.0,
    ):
        self.seed = seed
        crop: nn.Module = v2.RandomResizedCrop(image_size, scale=tuple(crop_scale), antialias=True)
        if crop_in_place:
            crop = CropInPlace(crop_scale)
        further: list[tuple[nn.Module, float]] = [
            (LowResolution(), low_resolution_probability),
            (v2.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5), photometric_probability),
            (Erasing(), erasing_probability),
        ]
        self.transform = v2.Compose(
            [
                v2.RandomHorizontalFlip(flip_probability),
                v2.RandomApply([crop], crop_probability),
                *(v2.RandomApply([change], probability) for change, probability in further if probability),
            ]
        )

    def __call__(self, face: torch.Tensor, number: int) -> torch.Tensor:
        """A face of `(3, image_size, image_size)` bytes; `number` is its place in the training."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, number, AUGMENTATION))
            return self.transform(face)


def load_training_data(
    args: argparse.Namespace,
    caches: Sequence[FaceCache],
    accelerator: Accelerator,
    vae: FirstStage,
    conditions: Sequence[str] = (),
) -> tuple[LatentFaces, EndlessBatchSampler, list[str], EncoderMark]:
    """Data set, its order, identity of each face, and encoder. All is checked before anything is encoded."""
    encoder = common_encoder({str(cache.folder): cache.encoder_mark for cache in caches})
    banks, lengths = [cache.embeddings() for cache in caches], [len(cache) for cache in caches]
    names = [f"{cache.folder}/{name}" for cache, bank in zip(caches, banks, strict=True) for name in bank.names]
    poses = None
    if args.side_view_share is not None:
        poses = np.concatenate([cache.poses() for cache in caches])
        unknown = np.isnan(poses[:, 0]).sum()
        if unknown and accelerator.is_main_process:
            logger.warning(f"{unknown} of {len(poses)} faces have no head pose: they count as no side views")
    shares = (args.train_data_shares, args.side_view_share)
    weights = sampling_weights(names, lengths, poses, args.balanced_sampling, *shares)
    values = [read_condition(CONDITIONS[name], caches) for name in conditions]
    rank, world_size = accelerator.process_index, accelerator.num_processes
    sampler = EndlessBatchSampler(sum(lengths), args.train_batch_size, args.seed, rank, world_size, weights=weights)
    with accelerator.main_process_first():
        files = [file for cache in caches for file in cache_latents(cache, vae, accelerator.device)]
    latents, embeddings = LatentSet(files), torch.cat([bank.embeddings for bank in banks])
    if len(latents) != len(embeddings):
        raise ValueError(
            f"{len(latents)} cached latents for {len(embeddings)} faces in {args.train_data}: delete the latents-*"
            " files to encode them again."
        )
    return LatentFaces(latents, embeddings, values), sampler, names, encoder
