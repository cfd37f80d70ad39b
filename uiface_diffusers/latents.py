"""Pictures to latents and back, for any of the supported first stages."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel

FirstStage = AutoencoderKL | AutoencoderTiny | VQModel
# decoded at once: 64 pictures of 128x128. A `VQModel` of 8192 codes, one for 16 pixels, then holds 2 GiB of distances,
# and a decoder with 128 channels about as much
PIXELS_AT_ONCE = 64 * 128 * 128


def encode_images(vae: FirstStage, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Encodes pictures to the latents that the denoiser sees.

    Args:
        vae: the first stage. A `VQModel`'s latents are taken before quantization, an `AutoencoderKL`'s are sampled.
        images (`torch.Tensor` of shape `(batch, 3, height, width)`): in [-1, 1].
        generator (`torch.Generator`, *optional*): for the sampling.

    Returns:
        `torch.Tensor` of shape `(batch, latent_channels, height / f, width / f)`: (z - shift_factor) * scaling_factor.
    """
    encoded = vae.encode(images)
    latents = encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents
    return (latents - _shift_factor(vae)) * vae.config.scaling_factor


def decode_latents(vae: FirstStage, latents: torch.Tensor) -> torch.Tensor:
    """The way back: `(batch, latent_channels, h, w)` -> `(batch, 3, height, width)`, about [-1, 1]. A `VQModel`
    quantizes the latents first. Large batches are decoded in parts, so that the memory does not grow with them."""
    latents = latents / vae.config.scaling_factor + _shift_factor(vae)
    blocks = vae.config.get("block_out_channels") or vae.config.decoder_block_out_channels
    pixels = latents.shape[-2] * latents.shape[-1] * 4 ** (len(blocks) - 1)
    parts = latents.split(max(1, PIXELS_AT_ONCE // pixels))
    if len(parts) == 1:
        return vae.decode(latents, return_dict=False)[0]
    return torch.cat([vae.decode(part, return_dict=False)[0] for part in parts])


def _shift_factor(vae: FirstStage) -> float:
    return vae.config.get("shift_factor") or 0.0
