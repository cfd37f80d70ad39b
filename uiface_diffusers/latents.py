"""Pictures to latents and back, for any of the supported first stages."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel

from .pictures import to_unit_range

FirstStage = AutoencoderKL | AutoencoderTiny | VQModel
# decoded at once: 64 pictures of 128x128. A `VQModel` of 8192 codes, one for 16 pixels, then holds 2 GiB of distances,
# and a decoder with 128 channels about as much
PIXELS_AT_ONCE = 64 * 128 * 128


def encode_images(
    vae: FirstStage, images: torch.Tensor, generator: torch.Generator | None = None, sample: bool = True
) -> torch.Tensor:
    """Encodes pictures to the latents that the denoiser sees.

    Args:
        vae: the first stage. A `VQModel`'s latents are taken before quantization, an `AutoencoderKL`'s are sampled.
        images (`torch.Tensor` of shape `(batch, 3, height, width)`): in [-1, 1].
        generator (`torch.Generator`, *optional*): for the sampling.
        sample (`bool`, defaults to `True`): `False` takes an `AutoencoderKL`'s mean.

    Returns:
        `torch.Tensor` of shape `(batch, latent_channels, height / f, width / f)`: (z - shift_factor) * scaling_factor.
    """
    encoded = vae.encode(images)
    if not hasattr(encoded, "latent_dist"):
        latents = encoded.latents
    else:
        latents = encoded.latent_dist.sample(generator) if sample else encoded.latent_dist.mode()
    return (latents - _shift_factor(vae)) * vae.config.scaling_factor


def decode_latents(vae: FirstStage, latents: torch.Tensor) -> torch.Tensor:
    """The way back: `(batch, latent_channels, h, w)` -> `(batch, 3, height, width)`, about [-1, 1]. A `VQModel`
    quantizes the latents first. Large batches are decoded in parts, so that the memory does not grow with them."""
    latents = latents / vae.config.scaling_factor + _shift_factor(vae)
    pixels = latents.shape[-2] * latents.shape[-1] * pixels_per_latent(vae) ** 2
    parts = latents.split(max(1, PIXELS_AT_ONCE // pixels))
    if len(parts) == 1:
        return vae.decode(latents, return_dict=False)[0]
    return torch.cat([vae.decode(part, return_dict=False)[0] for part in parts])


def encode_pictures(
    vae: FirstStage, pictures: list[np.ndarray], height: int, width: int, device: torch.device
) -> torch.Tensor:
    """Pictures of any size to latents of one, without chance, in parts as `decode_latents`.

    Args:
        pictures: `(height, width, 3)` RGB bytes each; stretched to the size of the latents (bilinear, antialiased).
        height, width (`int`): of the latents.
        device (`torch.device`): where the first stage computes; where it is, unless it is offloaded.

    Returns:
        `torch.Tensor` of shape `(len(pictures), latent_channels, height, width)`, in the dtype of the first stage.
    """
    size = (height * pixels_per_latent(vae), width * pixels_per_latent(vae))
    pixels = [to_unit_range(torch.from_numpy(picture).permute(2, 0, 1)[None]) for picture in pictures]
    resized = [
        each if each.shape[-2:] == size else F.interpolate(each, size, mode="bilinear", antialias=True)
        for each in pixels
    ]
    parts = torch.cat(resized).split(max(1, PIXELS_AT_ONCE // (size[0] * size[1])))
    return torch.cat([encode_images(vae, part.to(device, vae.dtype), sample=False) for part in parts])


def pixels_per_latent(vae: FirstStage) -> int:
    """Along one side of a picture."""
    blocks = vae.config.get("block_out_channels") or vae.config.decoder_block_out_channels
    return 2 ** (len(blocks) - 1)


def _shift_factor(vae: FirstStage) -> float:
    return vae.config.get("shift_factor") or 0.0
