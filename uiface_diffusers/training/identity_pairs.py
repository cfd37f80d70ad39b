"""Pairs of embeddings of one person, and what a flow learns from them."""

import hashlib
import os
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from ..data import FaceCache
from ..encoders import common_encoder
from ..models.identity_flow import IdentityFlow, path
from ..sphere import cosines_and_directions, tangent
from .means import RunningMeans

# cosine from which two embeddings of a person are of one photograph: their direction is noise of the arithmetic
COPIES = 0.9999


def place_of(name: str) -> float:
    """A number in [0, 1) that depends on a name alone."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:6], "big") / 2**48


class PersonEmbeddings(Dataset):
    """Embeddings of people with two faces or more, one person after the other. It fetches positions, of which `pairs`
    makes pairs.

    Args:
        folders: caches of `uiface prepare`, all of one encoder; people of two caches are never the same.
        share (`tuple[float, float]`, defaults to `(0.0, 1.0)`): takes the people whose names' hash, evenly spread over
            [0, 1), is from the first number on and below the second: whoever is held out is so in every cache.

    Attributes:
        embeddings (`torch.Tensor` of shape `(N, identity_dim)`): of unit length.
        first, count (`torch.Tensor` of shape `(N,)`): of each face's person, where the faces begin and how many.
        people (`int`): how many.
        left_out (`dict[str, int]`): faces of these people that make no pairs, by the reason.
        encoder_mark (`EncoderMark`): of the embeddings.
        fingerprints (`list[str]`): of the caches.

    Raises:
        ValueError: a folder is no finished cache, the caches are of two encoders, or nobody has two faces.
    """

    def __init__(self, folders: Sequence[str | os.PathLike], share: tuple[float, float] = (0.0, 1.0)):
        caches = [FaceCache(folder) for folder in folders]
        self.encoder_mark = common_encoder({str(cache.folder): cache.encoder_mark for cache in caches})
        self.fingerprints = [cache.fingerprint for cache in caches]
        kept, copies, alone = [], 0, 0
        for cache in caches:
            bank = cache.embeddings()
            faces: dict[str, list[int]] = {}
            for position, name in enumerate(bank.names):
                faces.setdefault(name, []).append(position)
            for name, positions in faces.items():
                if not share[0] <= place_of(name) < share[1]:
                    continue
                embeddings = F.normalize(bank.embeddings[positions])
                later_copies = (embeddings @ embeddings.T).triu(diagonal=1).amax(dim=0) >= COPIES
                copies += int(later_copies.sum())
                if len(positions) - int(later_copies.sum()) > 1:
                    kept.append(embeddings[~later_copies])
                else:
                    alone += 1
        self.left_out = {"copies of another face": copies, "alone of their person": alone}
        if not kept:
            raise ValueError(
                f"nobody in {', '.join(map(str, folders))} has two faces: pairs need them. {self.left_out}"
            )
        self.people, counts = len(kept), torch.tensor([len(each) for each in kept])
        self.embeddings = torch.cat(kept)
        self.count = counts.repeat_interleave(counts)
        self.first = (counts.cumsum(0) - counts).repeat_interleave(counts)

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        return torch.tensor(indices)

    def to(self, device: torch.device) -> "PersonEmbeddings":
        """Moves the embeddings, which are small, beside the model."""
        self.embeddings, self.first, self.count = (x.to(device) for x in (self.embeddings, self.first, self.count))
        return self

    def pairs(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The embeddings at `positions` `(N,)`, each with that of another face of its person, drawn by torch's global
        generator: twice `(N, identity_dim)`."""
        first, count = self.first[positions], self.count[positions]
        steps = 1 + (torch.rand(len(positions), device=positions.device) * (count - 1)).long().clamp(max=count - 2)
        return self.embeddings[positions], self.embeddings[first + (positions - first + steps) % count]

    def cosine_quantiles(self, number: int = 65) -> list[float]:
        """Evenly spaced quantiles of the cosines of all pairs of one person, every person with the same weight."""
        cosines, weights = [], []
        starts = self.first.unique().tolist()
        for start, end in zip(starts, [*starts[1:], len(self)], strict=True):
            embeddings = self.embeddings[start:end]
            row, column = torch.triu_indices(len(embeddings), len(embeddings), offset=1)
            each = (embeddings @ embeddings.T)[row, column]
            cosines.append(each)
            weights.append(torch.full_like(each, 1 / len(each)))
        values, order = torch.cat(cosines).double().sort()
        shares = torch.cat(weights).double()[order].cumsum(0)
        places = np.linspace(0, 1, number) * shares[-1].item()
        return np.interp(places, shares.cpu().numpy(), values.cpu().numpy()).clip(-1, 1).round(5).tolist()


def flow_losses(
    model: torch.nn.Module, anchors: torch.Tensor, others: torch.Tensor, time: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """The squared error of a flow's velocity on pairs of embeddings, mean over the components.

    Args:
        model: an `IdentityFlow`.
        anchors, others (`torch.Tensor` of shape `(N, identity_dim)`): of unit length.
        time (`torch.Tensor` of shape `(N,)`): from 0, the noise, to 1, the data.
        noise (`torch.Tensor` of shape `(N, identity_dim)`): of a standard normal distribution.

    Returns:
        `(N,)`; the untrained model's are (pi/2) ** 2 on average.
    """
    cosines, directions = cosines_and_directions(anchors, others)
    # as long as the noise, which has one dimension less than the embeddings
    dimension = anchors.shape[1] - 1
    sample, velocity = path(time, tangent(noise, anchors), dimension**0.5 * directions)
    predicted = model(sample, time, anchors, cosines, return_dict=False)[0]
    return (predicted.float() - velocity).square().sum(dim=1) / dimension


@torch.no_grad()
def compare_directions(flow: IdentityFlow, faces: PersonEmbeddings, number: int) -> dict[str, float]:
    """How a flow does on faces of people with three or more.

    Args:
        number (`int`): anchors, about as many.

    Returns:
        `loss`, and the mean cosine between two directions of one anchor at the same cosines: of real faces (`real`),
        of the flow with its `shared_noise` (`flow`).

    Raises:
        ValueError: nobody has three faces.
    """
    generator = torch.Generator().manual_seed(0)
    of_three = (faces.count > 2).nonzero().flatten()
    if not len(of_three):
        raise ValueError("nobody has three faces, which are needed to compare directions.")
    positions = of_three[:: max(1, len(of_three) // number)]
    first, place, count = faces.first[positions], positions - faces.first[positions], faces.count[positions]
    anchors = faces.embeddings[positions]
    real = [faces.embeddings[first + (place + step) % count] for step in (1, 2)]
    noise = torch.randn(4, *anchors.shape, generator=generator).to(anchors.device)
    time = torch.rand(len(anchors), generator=generator).to(anchors.device)
    pairs = [cosines_and_directions(anchors, each) for each in real]
    drawn = [
        flow.directions(flow.mix_noise(own, noise[3]), anchors, cosines)
        for own, (cosines, _) in zip(noise[1:3], pairs, strict=True)
    ]
    return {
        "loss": flow_losses(flow, anchors, real[0], time, noise[0]).mean().item(),
        "real": (pairs[0][1] * pairs[1][1]).sum(dim=1).mean().item(),
        "flow": (drawn[0] * drawn[1]).sum(dim=1).mean().item(),
    }


def fit_shared_noise(flow: IdentityFlow, faces: PersonEmbeddings, number: int, rounds: int = 7) -> float:
    """Sets the `shared_noise` of a flow, by bisection, so that two directions of one anchor are as near to each other
    as those of real faces; see `compare_directions`."""
    low, high = 0.0, 1.0
    for _ in range(rounds):
        middle = (low + high) / 2
        flow.register_to_config(shared_noise=middle)
        figures = compare_directions(flow, faces, number)
        low, high = (middle, high) if figures["flow"] < figures["real"] else (low, middle)
    share = round((low + high) / 2, 4)
    flow.register_to_config(shared_noise=share)
    return share


class FlowLog(RunningMeans):
    """The mean of the loss."""

    def add(self, losses: torch.Tensor) -> None:
        self.add_mean("loss", losses, self.count(losses))
