"""Pictures to latents and back, for any of the supported first stages."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel

FirstStage = AutoencoderKL | AutoencoderTiny | VQModel


def encode_images(vae: FirstStage, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Encodes pictures to the latents that the denoiser sees.

    Args:
        vae: the first stage. A `VQModel`'s latents are taken before quantisation, an `AutoencoderKL`'s are sampled.
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
    quantises the latents first."""
    return vae.decode(latents / vae.config.scaling_factor + _shift_factor(vae), return_dict=False)[0]


def _shift_factor(vae: FirstStage) -> float:
    return vae.config.get("shift_factor") or 0.0
