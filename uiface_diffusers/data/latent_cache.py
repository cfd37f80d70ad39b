"""Latents of prepared faces, both flips, once a first stage."""

import copy
from collections.abc import Sequence
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


@torch.no_grad()
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
    files = [shard.with_name(shard.name.replace("faces", f"latents-{key}")) for shard in faces.shards]
    files = [file.with_suffix(".safetensors") for file in files]
    missing = [file for file, shard in zip(files, faces.shards, strict=True) if not _is_of(file, shard)]
    with tqdm(total=len(faces), unit="face", desc="latents", disable=not missing) as progress:
        for index, (shard, file) in enumerate(zip(faces.shards, files, strict=True)):
            if file not in missing:
                progress.update(shard_rows(shard))
                continue
            images = list(faces.shard_images(shard))
            generator = torch.Generator(device).manual_seed(index)
            latents = []
            for start in range(0, len(images), batch_size):
                batch = torch.from_numpy(np.stack(images[start : start + batch_size]))
                pixels = scale_to_unit_range(batch.to(device, vae.dtype).permute(0, 3, 1, 2))
                both = [encode_images(vae, flip, generator) for flip in (pixels, pixels.flip(-1))]
                latents.append(torch.stack(both, dim=1).half().cpu())
                progress.update(len(batch))
            with complete_file(file) as beside:
                save_file({"latents": torch.cat(latents).contiguous()}, beside, metadata=_stamp(shard))
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
    """The latents of all files that `cache_latents` gave, fetched a batch at a time. The files are mapped into memory:
    processes of one machine share them.

    Args:
        files: in order.
    """

    def __init__(self, files: Sequence[Path]):
        self.parts = [read_safetensors(file, ["latents"])["latents"] for file in files]
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
