"""Feature networks for precision and recall, KID and the classifier test."""

import os
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..files import read_safetensors
from ..fingerprint import weights_fingerprint
from .perceptual import TORCHVISION

if TYPE_CHECKING:
    import lpips

SIZES = {"vgg16": 224, "inception_v3": 299}
# weights come from a file: no time is spent on random ones
UNSET = {"init_weights": False}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class LpipsFeatures(nn.Module):
    """The last layer of an LPIPS backbone, averaged over its positions: of AlexNet 256 dimensions.

    Args:
        perceptual: what `load_lpips` returns.
    """

    def __init__(self, perceptual: "lpips.LPIPS"):
        super().__init__()
        self.perceptual = perceptual
        self.name = f"LPIPS {perceptual.pnet_type}, last layer averaged, {weights_fingerprint(perceptual.net)}"

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(N, 3, height, width)` in [-1, 1] -> `(N, D)`."""
        return self.perceptual.net(self.perceptual.scaling_layer(pixels))[-1].mean(dim=(2, 3))


class LpipsGridFeatures(nn.Module):
    """Three layers of an LPIPS backbone, each averaged to 4x4 positions, so that they still tell where in the face
    something is: of AlexNet the ReLUs 2, 3 and 5, 13,312 dimensions D in all. Each layer's part has the length
    sqrt(D): `x @ y / D`, which KID's kernel takes, is the sum of the layers' three cosines.

    Args:
        perceptual: what `load_lpips` returns.
    """

    LAYERS, GRID, SIZE = (2, 3, 5), 4, (128, 128)

    def __init__(self, perceptual: "lpips.LPIPS"):
        super().__init__()
        self.perceptual = perceptual
        self.network = TORCHVISION[perceptual.pnet_type]
        fingerprint = weights_fingerprint(perceptual.net)
        self.name = f"LPIPS {perceptual.pnet_type}, layers 2, 3 and 5 at 4x4, {fingerprint}"

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(N, 3, height, width)` in [-1, 1] -> `(N, D)`."""
        pixels = F.interpolate(self.perceptual.scaling_layer(pixels), self.SIZE, mode="bilinear", antialias=True)
        layers = self.perceptual.net(pixels)
        parts = [F.adaptive_avg_pool2d(layers[number - 1], self.GRID).flatten(1) for number in self.LAYERS]
        length = sum(part.shape[1] for part in parts) ** 0.5
        return torch.cat([F.normalize(part) * length for part in parts], dim=1)


class TorchvisionFeatures(nn.Module):
    """A classifier of torchvision up to the layer that evaluations use.

    - `"vgg16"`: 4096 dimensions, the second fully connected layer after its ReLU, of 224x224 (Kynkaanniemi et al.
      2019);
    - `"inception_v3"`: 2048 dimensions, the averages before the classifier, of 299x299 (DCFace's style space is
      Inception's; which weights those were the paper does not say).

    Args:
        network: one of these.
        weights (*optional*): safetensors file with the state dict of torchvision's model; torchvision downloads its
            ImageNet weights if not given.

    Raises:
        OSError: the weights are not given and cannot be downloaded.
        ValueError: another network; or the file is not of it, or damaged.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: str, weights: str | os.PathLike | None = None):
        super().__init__()
        from torchvision import models  # comes with lpips, of the extra `train`

        if network not in SIZES:
            raise ValueError(f"`network` has to be one of {tuple(SIZES)} but is {network!r}.")
        options = {"transform_input": False} if network == "inception_v3" else {}
        pretrained = "IMAGENET1K_V1" if weights is None else None
        try:
            self.model = getattr(models, network)(weights=pretrained, **options, **({} if pretrained else UNSET))
        except (OSError, RuntimeError) as error:  # no network, or a download that was cut short
            raise OSError(
                f"torchvision's {network} cannot be downloaded ({error}): give its weights, a safetensors file, by"
                " `weights` (--feature-weights)."
            ) from error
        if weights is not None:
            try:
                self.model.load_state_dict(read_safetensors(weights))
            except RuntimeError as error:
                raise ValueError(f"{weights} does not hold torchvision's {network}: {error}") from error
        # in [0, 1] as torchvision's classifiers; this Inception takes [-1, 1]
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if network == "vgg16" else ((0.5,) * 3, (0.5,) * 3)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.size = (SIZES[network], SIZES[network])
        self.name = f"torchvision {network}, {weights_fingerprint(self.model)}"
        if network == "vgg16":
            self.model.classifier = self.model.classifier[:5]
        else:
            self.model.fc = nn.Identity()
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(N, 3, height, width)` in [-1, 1] -> `(N, D)`."""
        pixels = F.interpolate(pixels, self.size, mode="bilinear", antialias=True)
        return self.model((pixels / 2 + 0.5 - self.mean) / self.std)
