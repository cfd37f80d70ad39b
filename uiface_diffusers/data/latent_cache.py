"""Latents of prepared faces, both flips, once a first stage."""

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm import tqdm

from ..files import complete_file, open_safetensors, read_safetensors
from ..fingerprint import model_fingerprint
from ..latents import FirstStage, encode_images
from ..pictures import scale_to_unit_range
from .face_cache import FaceCache, shard_rows


def cache_latents(
    faces: FaceCache, vae: FirstStage, device: torch.device | str = "cpu", batch_size: int = 32
) -> list[Path]:
    """Encodes the faces of a cache and their mirror images, one file per shard beside it. Resumable.

    Args:
        faces: prepared faces.
        vae: the first stage, in eval mode; encoded in its own dtype.
        device: where to encode.

    Returns:
        The files, in order. Each has `latents` of shape `(n, 2, latent_channels, h, w)` in half precision: the face
        and its mirror image.
    """
    key = model_fingerprint(vae)
    # twice as fast as contiguous convolutions, on the CPU too; a copy, so that the caller's stays as it is
    vae = copy.deepcopy(vae)
    vae.to(device, memory_format=torch.channels_last)  # type: ignore[arg-type]  # diffusers' decorator has other types
    encode = functools.partial(encode_images, vae)
    return cache_both_flips(faces, "latents", key, encode, device, vae.dtype, batch_size)


@torch.no_grad()
def cache_both_flips(
    faces: FaceCache,
    name: str,
    key: str,
    encode: Callable[[torch.Tensor, torch.Generator], torch.Tensor],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 32,
) -> list[Path]:
    """Computes something of the faces of a cache and of their mirror images, one file per shard beside it. Resumable.

    Args:
        faces: prepared faces.
        name (`str`): of the tensor in each file, and how the files' names begin.
        key (`str`): what else is in their names: a fingerprint of `encode`.
        encode: takes pictures `(n, 3, size, size)` in [-1, 1] and a generator.
        device, dtype: of these pictures.

    Returns:
        The files, in order. Each has `name` of shape `(n, 2, ...)` in half precision: of the face and of its mirror
        image.
    """
    files = [shard.with_name(shard.name.replace("faces", f"{name}-{key}")) for shard in faces.shards]
    files = [file.with_suffix(".safetensors") for file in files]
    missing = [file for file, shard in zip(files, faces.shards, strict=True) if not _is_of(file, shard)]
    with tqdm(total=len(faces), unit="face", desc=name, disable=not missing) as progress:
        for index, (shard, file) in enumerate(zip(faces.shards, files, strict=True)):
            if file not in missing:
                progress.update(shard_rows(shard))
                continue
            images = list(faces.shard_images(shard))
            generator = torch.Generator(device).manual_seed(index)
            parts = []
            for start in range(0, len(images), batch_size):
                batch = torch.from_numpy(np.stack(images[start : start + batch_size]))
                pixels = scale_to_unit_range(batch.to(device, dtype).permute(0, 3, 1, 2))
                both = [encode(flip, generator) for flip in (pixels, pixels.flip(-1))]
                parts.append(torch.stack(both, dim=1).half().cpu())
                progress.update(len(batch))
            with complete_file(file) as beside:
                save_file({name: torch.cat(parts).contiguous()}, beside, metadata=_stamp(shard))
    return files


def _stamp(shard: Path) -> dict[str, str]:
    return {"shard_bytes": str(shard.stat().st_size)}


def _is_of(file: Path, shard: Path) -> bool:
    """Whether a file of latents is there, whole, and of a shard as it is now."""
    try:
        with open_safetensors(file) as content:
            return content.metadata() == _stamp(shard)
    except ValueError:  # is written again
        return False


class LatentSet(Dataset):
    """The latents of all files that `cache_latents` gave, or what else `cache_both_flips` did, fetched a batch at a
    time. The files are mapped into memory: processes of one machine share them.

    Args:
        files: in order.
        name (`str`, defaults to `"latents"`): of the tensor in them.
    """

    def __init__(self, files: Sequence[Path], name: str = "latents"):
        self.parts = [read_safetensors(file, [name])[name] for file in files]
        self.ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def shape(self) -> torch.Size:
        """Of one face's latents and its mirror image's: `(2, latent_channels, h, w)`."""
        return self.parts[0].shape[1:]

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """`(batch, 2, latent_channels, h, w)` in half precision."""
        parts = torch.bucketize(torch.tensor(indices), self.ends, right=True).tolist()
        rows = [self.parts[part][index - int(self.ends[part])] for part, index in zip(parts, indices, strict=True)]
        return torch.stack(rows)
