"""How much of a face survives the first stage."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..latents import FirstStage
from ..pictures import to_bytes, to_unit_range


class ReconstructionQuality(NamedTuple):
    """Reconstructions `(N, 3, height, width)` in [-1, 1], and figures, each the mean over all faces: `l1` (of
    [-1, 1]), `lpips`, and `identity/NAME`, the cosine of the embeddings of face and reconstruction."""

    reconstructions: torch.Tensor
    figures: dict[str, float]


@torch.no_grad()
def reconstruct(vae: FirstStage, pixels: torch.Tensor) -> torch.Tensor:
    """`(N, 3, height, width)` in [-1, 1] through the first stage and back, clamped to [-1, 1]. An `AutoencoderKL`'s
    latents are its mean."""
    encoded = vae.encode(pixels)
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return vae.decode(latents).sample.clamp(-1, 1)


def reconstruct_pictures(vae: FirstStage, pictures: Sequence[np.ndarray], batch_size: int = 32) -> list[np.ndarray]:
    """RGB bytes `(height, width, 3)`, all of one size, through the first stage and back."""
    found = []
    for start in range(0, len(pictures), batch_size):
        pixels = torch.from_numpy(np.stack(pictures[start : start + batch_size])).permute(0, 3, 1, 2)
        result = reconstruct(vae, to_unit_range(pixels.to(vae.device)).to(vae.dtype)).float().cpu()
        found += list(to_bytes(result).permute(0, 2, 3, 1).numpy())
    return found


@torch.no_grad()
def reconstruction_quality(
    vae: FirstStage,
    pixels: torch.Tensor,
    perceptual: nn.Module | None = None,
    recognizers: Mapping[str, nn.Module] | None = None,
    batch_size: int = 32,
) -> ReconstructionQuality:
    """Compares faces with their reconstructions.

    Args:
        vae: the first stage, in eval mode.
        pixels (`torch.Tensor` of shape `(N, 3, height, width)`): bytes, or floating point in [-1, 1].
        perceptual: LPIPS, what `load_lpips` returns.
        recognizers: name -> module that embeds `(N, 3, height, width)` in [-1, 1], such as `TorchRecognizer`.
        batch_size: faces per call.

    Returns:
        The reconstructions and figures.
    """
    reconstructions: list[torch.Tensor] = []
    sums: dict[str, float] = {}
    for batch in pixels.split(batch_size):
        batch = to_unit_range(batch).to(vae.device, vae.dtype)
        result = reconstruct(vae, batch)
        figures = {"l1": (result - batch).abs().mean(dim=(1, 2, 3))}
        if perceptual is not None:
            figures["lpips"] = perceptual(batch, result).mean(dim=(1, 2, 3))
        for name, recognizer in (recognizers or {}).items():
            figures[f"identity/{name}"] = F.cosine_similarity(recognizer(batch), recognizer(result))
        for name, values in figures.items():
            sums[name] = sums.get(name, 0.0) + values.sum().item()
        reconstructions.append(result.cpu())
    means = {name: value / len(pixels) for name, value in sums.items()}
    return ReconstructionQuality(torch.cat(reconstructions), means)
