"""How much do the images of one identity differ? LPIPS (Zhang et al. 2018) between them."""

import numpy as np
import torch
from torch import nn

from ..faces import ALIGNED_SIZE
from ..fingerprint import weights_fingerprint
from ..seeds import image_seed
from .face_set import computed_once, digest
from .figures import Description, Question
from .measure import Measure
from .plots import plot_histograms
from .separability import genuine_pairs

PAIRS_AT_ONCE = 32


def identity_pairs(name: str, images: int, max_pairs: int | None, seed: int = 0) -> np.ndarray:
    """Pairs of an identity's images, all or a number of them drawn without replacement. The draw depends on the
    identity's name, the number of its images and the seed, and not on the other identities.

    Args:
        name: the identity's.
        images (`int`): how many it has.
        max_pairs (*optional*): draw so many if there are more.

    Returns:
        `np.ndarray` of shape `(P, 2)`: positions within the identity.
    """
    return genuine_pairs(np.zeros(images, int), max_pairs, image_seed(seed, name, 0))


@torch.no_grad()
def mean_lpips(images: torch.Tensor, pairs: np.ndarray, perceptual: nn.Module) -> float:
    """Mean LPIPS of pairs of images.

    Args:
        images (`torch.Tensor` of shape `(N, 3, height, width)`): in [-1, 1], on the network's device.
        pairs (`np.ndarray` of shape `(P, 2)`): positions, at least one pair.
        perceptual: what `load_lpips` returns.
    """
    parts = [pairs[start : start + PAIRS_AT_ONCE] for start in range(0, len(pairs), PAIRS_AT_ONCE)]
    distances = [perceptual(images[part[:, 0]], images[part[:, 1]]).flatten() for part in parts]
    return torch.cat(distances).double().mean().item()


class DiversityMeasure(Measure):
    """LPIPS between images of one identity."""

    needs = ("perceptual",)
    figures = {
        "intra_class_lpips": Description(
            "Intra-class LPIPS",
            "",
            "Perceptual distance between images of one identity, averaged over identities. Larger means more varied.",
            Question.DIVERSE,
            headline=True,
        ),
    }

    def measure(self) -> None:
        inputs, faces, perceptual = self.inputs, self.inputs.faces, self.inputs.perceptual
        number, seed = self.settings.lpips_pairs, self.settings.seed
        members = {name: positions for name, positions in faces.identities.items() if len(positions) > 1}
        pairs = [identity_pairs(name, len(positions), number, seed) for name, positions in members.items()]
        positions = list(members.values())

        def compute(rows: range) -> torch.Tensor:
            (row,) = rows
            needed, places = np.unique(pairs[row], return_inverse=True)
            images = faces.pixels([positions[row][i] for i in needed]).to(inputs.device)
            return torch.tensor([mean_lpips(images, places.reshape(-1, 2), perceptual)], dtype=torch.float64)

        network = f"{perceptual.pnet_type} {weights_fingerprint(perceptual)}"
        folder = inputs.cache / f"lpips-{digest(network, number, seed, faces.key)}"
        distances = computed_once(folder, len(members), compute, "LPIPS", "identity", batch_size=1, batches_a_file=50)
        detail = f"Of {sum(map(len, pairs)):,} pairs of {len(members):,} identities."
        conditions = {"network": network, "size": ALIGNED_SIZE}
        self.add({"intra_class_lpips": distances.mean().item()}, conditions, detail)
        plot = plot_histograms({"mean of an identity": distances}, "LPIPS")
        self.pictures.append(("Perceptual distance within identities", plot))
