"""What the losses on faces share: where an error matters most, and float32 whatever the model is trained in."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F


def full_precision(device: torch.device) -> AbstractContextManager:
    """Turns autocast off: LPIPS and the cosine of embeddings compare near values, whose differences drown in bf16."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


@functools.lru_cache(maxsize=8)
def facial_feature_weights(size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Where an aligned face's error matters most: eyes and mouth by the five-point template of ArcFace, `(size, size)`
    with mean 1."""
    # two eyes, the mouth's corners and middle, in pixels of 112x112 (Deng et al. 2019)
    points = torch.tensor([[38.3, 51.7], [73.5, 51.5], [41.5, 92.4], [56.1, 92.3], [70.7, 92.2]], device=device)
    side = (torch.arange(size, device=device) + 0.5) * 112 / size
    across, down = (side[None, :, None] - points[:, 0]), (side[:, None, None] - points[:, 1])
    weights = 1 + 3 * torch.exp(-(across**2 + down**2) / (2 * 8.0**2)).amax(dim=-1)
    return weights / weights.mean()


def draw_rows(weights: torch.Tensor, number: int) -> torch.Tensor:
    """`number` different rows, drawn in proportion to `weights` `(rows,)` (Gumbel top-k). A fixed number, and so the
    device need not be waited for; rows of weight 0 come last."""
    return (weights.log() - torch.empty_like(weights).exponential_().log()).topk(min(number, len(weights))).indices


def jitter(faces: torch.Tensor) -> torch.Tensor:
    """Faces `(N, 3, height, width)`, each mirrored or not, scaled by up to 5 % and moved by up to 3 % of its side: a
    recognizer is harder to satisfy by patterns of pixels."""
    number, device = len(faces), faces.device
    scale = 1 + 0.05 * (2 * torch.rand(number, device=device) - 1)
    theta = torch.zeros(number, 2, 3, device=device)
    theta[:, 0, 0] = scale * (1 - 2 * torch.randint(2, (number,), device=device))
    theta[:, 1, 1] = scale
    theta[:, :, 2] = 0.06 * (2 * torch.rand(number, 2, device=device) - 1)
    grid = F.affine_grid(theta, list(faces.shape), align_corners=False)
    return F.grid_sample(faces, grid, padding_mode="border", align_corners=False)
