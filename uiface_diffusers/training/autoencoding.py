"""What the training of a first stage is made of."""

import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from insightface.model_zoo.arcface_onnx import ArcFaceONNX
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from ..faces import FaceEncoder, TorchRecognizer
from ..latents import FirstStage
from ..pictures import to_bytes, to_unit_range
from .means import RunningMeans


def load_differentiable(name: str, root: str, device: torch.device | None = None) -> TorchRecognizer:
    """The recognizer of a model pack, or of an ONNX file, for a loss. `device` is this process's: the pack is read
    there."""
    if not name.endswith(".onnx"):
        return FaceEncoder(name, root, det_size=160, device=device).to_torch()
    model = ArcFaceONNX(name)
    return TorchRecognizer(name, model.input_mean, model.input_std)


class Reconstruction(nn.Module):
    """A first stage as one module, pixels to pixels, so that all gradients are reduced together."""

    def __init__(self, vae: FirstStage, freeze_encoder: bool = False, latent_noise: float = 0.0):
        super().__init__()
        self.vae, self.latent_noise = vae, latent_noise
        if freeze_encoder:
            vae.encoder.requires_grad_(False)
            quant_conv = getattr(vae, "quant_conv", None)
            if quant_conv is not None:
                quant_conv.requires_grad_(False)

    def forward(self, pixels: torch.Tensor, halve: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstruction, of half the size if `halve`, and the regularization of the latents."""
        encoded = self.vae.encode(pixels)
        if isinstance(self.vae, AutoencoderKL):
            posterior = encoded.latent_dist
            latents = posterior.sample()
            regularization = posterior.kl().mean() / latents[0].numel()
        else:
            latents = encoded.latents
            regularization = latents.square().mean() / 2
        latents = halved(latents) if halve else latents
        if self.latent_noise:
            latents = latents + self.latent_noise * torch.randn_like(latents)
        decoded = self.vae.decode(latents)
        if isinstance(self.vae, VQModel):
            regularization = decoded.commit_loss.mean()
        return decoded.sample, regularization


class PatchDiscriminator(nn.Sequential):
    """Tells photographs from reconstructions, patch by patch: `(N, 3, height, width)` in [-1, 1] -> logits
    `(N, 1, height / 8, width / 8)`. Spectral norm bounds its slope."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256)):
        layers, channels = [], 3
        for width in widths:
            layers += [spectral_norm(nn.Conv2d(channels, width, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
            channels = width
        super().__init__(*layers, spectral_norm(nn.Conv2d(channels, 1, 3, padding=1)))


def hinge_loss(discriminator: nn.Module, real: torch.Tensor, reconstructed: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss on both kinds of faces (Lim & Ye 2017)."""
    of_real, of_reconstructed = discriminator(torch.cat([real, reconstructed])).chunk(2)
    return (F.relu(1 - of_real).mean() + F.relu(1 + of_reconstructed).mean()) / 2


def halved(tensor: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(tensor, 2)


@torch.no_grad()
def measure_latents(vae: FirstStage, pixels: torch.Tensor, batch_size: int = 32) -> tuple[float, float]:
    """Mean and standard deviation of the latents of `(N, 3, height, width)` bytes, over all components; an
    `AutoencoderKL`'s are sampled, as for the denoiser."""
    parts = []
    generator = torch.Generator(vae.device).manual_seed(0)
    for batch in pixels.split(batch_size):
        encoded = vae.encode(to_unit_range(batch).to(vae.device, vae.dtype))
        parts.append(encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents)
    latents = torch.cat(parts).double()
    return latents.mean().item(), latents.std().item()


def picture_grid(pixels: torch.Tensor, reconstructions: torch.Tensor, columns: int = 8) -> PIL.Image.Image:
    """Rows of photographs, each above its row of reconstructions."""
    rows, columns = [], min(columns, len(pixels))
    for start in range(0, len(pixels) - columns + 1, columns):
        for row in (to_unit_range(pixels), reconstructions):
            rows.append(torch.cat(list(row[start : start + columns]), dim=2))
    return PIL.Image.fromarray(to_bytes(torch.cat(rows, dim=1)).permute(1, 2, 0).numpy())


class TermsLog(RunningMeans):
    """Means of the loss's terms over the steps in which it was finite."""

    def add(self, loss: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
        finite = self.count(loss)
        for name, term in terms.items():
            self.add_mean(name, term, finite)
