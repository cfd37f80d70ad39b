"""Features of the denoiser aligned with a recognizer's (REPA: Yu et al., ICLR 2025, arXiv 2410.06940), and recognizers
of one's own in the losses.

The teacher is a frozen recognizer. Its features of the clean faces are computed once and kept beside the latents, so
that a step costs one small MLP more.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from ..data import FaceCache, LatentSet
from ..data.latent_cache import cache_both_flips
from ..denoisers import denoiser_kind
from ..evaluation.recognizers import ModelRecognizer, load_recognizer
from ..faces import FaceEncoder
from ..fingerprint import weights_fingerprint
from ..models.face_recognition import IResNetModel
from .denoising import ConditionalDenoiser

# Of the teacher's features, in the cache. 77,000 faces, both flips, 8x8 locations in half precision are 1.3 GB so,
# and 10 GB with the 512 channels of an IResNet. A Gaussian projection keeps every cosine c up to a deviation of
# (1 - c ** 2) / sqrt(64) <= 0.125 (Johnson and Lindenstrauss). It needs no pass over the faces, unlike PCA, and is the
# same for all caches. An IResNet's map comes out of a batch norm: no common mean outweighs what differs.
CHANNELS = 64


class OwnRecognizer(nn.Module):
    """An `IResNetModel` that embeds faces of any size.

    Args:
        folder: as `save_pretrained` writes it, such as `training/train_face_recognition.py` does.

    Raises:
        ValueError: it has no such model.
    """

    def __init__(self, folder: str | os.PathLike):
        super().__init__()
        if not Path(folder).is_dir():
            raise ValueError(
                f"{folder} is no folder: give that of a recognizer of training/train_face_recognition.py."
            )
        loaded = load_recognizer(folder, device="cpu")
        model = loaded.model if isinstance(loaded, ModelRecognizer) else None
        if not isinstance(model, IResNetModel):
            raise ValueError(f"{folder} has a {type(model).__name__}, not an IResNet.")
        self.model = model.eval().requires_grad_(False)

    def _resized(self, faces: torch.Tensor) -> torch.Tensor:
        size = (self.model.config.image_size,) * 2
        return F.interpolate(faces, size, mode="bilinear", antialias=True) if faces.shape[-2:] != size else faces

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        """Embeddings `(N, embedding_dim)` of unit length, of aligned faces `(N, 3, size, size)` in [-1, 1]."""
        return F.normalize(self.model(self._resized(faces), return_dict=False)[0])

    def spatial(self, faces: torch.Tensor) -> torch.Tensor:
        """The last map of features `(N, C, h, w)` of the same faces; 7x7 of 112x112 faces."""
        return self.model.spatial_features(self._resized(faces))


class Teacher(nn.Module):
    """What the denoiser's features are aligned with.

    Args:
        source: a folder for `OwnRecognizer`, or the encoder of the training data.

    Raises:
        ValueError: there is no map of features.
    """

    def __init__(self, source: str | FaceEncoder):
        super().__init__()
        self.recognizer = OwnRecognizer(source) if isinstance(source, str) else source.to_torch().spatial()

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the recognizer's weights."""
        return weights_fingerprint(self.recognizer)

    @torch.no_grad()
    def forward(self, faces: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """
        Args:
            faces (`torch.Tensor` of shape `(N, 3, size, size)`): aligned, in [-1, 1].
            grid: the denoiser's, `(h, w)`.

        Returns:
            `(N, h * w, C)` with C <= 64: the last map, resized (bilinear) and projected, of unit length everywhere.
        """
        own = self.recognizer
        features = F.interpolate(
            own.spatial(faces) if isinstance(own, OwnRecognizer) else own(faces), grid, mode="bilinear"
        )
        features = features.flatten(2).transpose(1, 2)
        channels = features.shape[-1]
        if channels > CHANNELS:
            generator = torch.Generator().manual_seed(channels)
            features = features @ torch.randn(channels, CHANNELS, generator=generator).to(features.device)
        return F.normalize(features, dim=-1)


def cache_features(
    caches: Sequence[FaceCache], teacher: Teacher, grid: tuple[int, int], device: torch.device | str
) -> LatentSet:
    """The teacher's features of all faces and their mirror images, `(2, h * w, C)` each, kept in half precision beside
    the latents.

    Raises:
        ValueError: a file that is there has features of another shape.
    """
    teacher, key = teacher.to(device), f"{teacher.fingerprint}-{grid[0]}x{grid[1]}"

    def encode(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return teacher(pixels, grid)

    files = [file for cache in caches for file in cache_both_flips(cache, "features", key, encode, device)]
    features = LatentSet(files, "features")
    for file, part in zip(files, features.parts, strict=True):
        if part.shape[1:] != (2, grid[0] * grid[1], features.shape[-1]):
            raise ValueError(f"{file} has features of shape {tuple(part.shape[1:])}: delete it to compute it again.")
    if len(features) != sum(len(cache) for cache in caches):
        raise ValueError(
            f"{len(features)} cached features for {sum(map(len, caches))} faces: delete the features-* files."
        )
    return features


class AlignedDenoiser(nn.Module):
    """A denoiser that also gives the features of its middle, brought into the teacher's space by an MLP of three
    layers. The MLP is trained along, and of no use afterwards.

    Args:
        denoiser (`ConditionalDenoiser`): is changed only by a hook, which works in training mode.
        middle (`torch.nn.Module`): of its network, as `Denoiser.middle` gives it.
        inner (`int`): channels of `middle`.
        channels (`int`): of the teacher's features.
    """

    def __init__(self, denoiser: ConditionalDenoiser, middle: nn.Module, inner: int, channels: int):
        super().__init__()
        self.denoiser = denoiser
        hidden = 2 * inner  # REPA: 2,048 of 1,152
        layers = (
            nn.Linear(inner, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, channels),
        )
        self.head = nn.Sequential(*layers)
        # no graph break: `torch.compile` sees through a hook and what it fills
        self._taken: dict[str, torch.Tensor] = {}
        middle.register_forward_hook(self._take)

    def _take(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if module.training:
            self._taken["features"] = output

    def forward(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction, and features `(batch, h * w, channels)`."""
        prediction = self.denoiser(*args)
        features = self._taken.pop("features")
        tokens = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
        return prediction, self.head(tokens)


def align_features(
    accelerator: Accelerator,
    denoiser: ConditionalDenoiser,
    teacher: Teacher,
    caches: Sequence[FaceCache],
    latent_size: Sequence[int],
) -> tuple[AlignedDenoiser, LatentSet]:
    """The denoiser with an MLP beside it, and the teacher's features of all faces.

    Args:
        latent_size: height and width.

    Raises:
        ValueError: the denoiser has no known middle; or `cache_features`'s.
    """
    height, width = latent_size
    middle, inner, grid = denoiser_kind(denoiser.unet).middle(denoiser.unet, height, width)
    with accelerator.main_process_first():
        features = cache_features(caches, teacher, grid, accelerator.device)
    return AlignedDenoiser(denoiser, middle, inner, features.shape[-1]), features
