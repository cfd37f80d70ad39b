#!/usr/bin/env python
"""How near perturbed embeddings are to real ones: the cosines of pairs of one identity, of real faces, of an identity
flow and of IDperturb, as Wasserstein-1 distance; and the EER against pairs of two identities.

    python benchmarks/identity_flow.py runs/identity_flow --people cache/photos --held-out 0.1

Identities are the people that the training held out (`--held-out` is its `--validation-share`), as far as none of the
training's people looks like them: one real embedding of each is the anchor, and as many embeddings are made from it as
there are other real ones. Two kinds of pairs are told apart: of an anchor and an embedding made from it, and of two
embeddings made from one anchor, which is what the images of a data set are to each other. The last column is the mean
cosine of two directions of one anchor. The flow is measured as `uiface generate` uses it, with noise that the images
of an identity share, and with independent noise; IDperturb as it is, and with shared noise.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from uiface_diffusers.evaluation.verification import equal_error_rate
from uiface_diffusers.identities import largest_cosines, perturb_embeddings
from uiface_diffusers.loading import load_identity_flow
from uiface_diffusers.models import IdentityFlow
from uiface_diffusers.seeds import COMMON_PERTURBATION, PERTURBATION, image_generator
from uiface_diffusers.sphere import cosines_and_directions
from uiface_diffusers.training.identity_pairs import PersonEmbeddings

# cosine of the mean embeddings of two people from which they may be the same one under two names
SAME = 0.5
# of cosines to the anchor
RANGES = ((0.4, 1.0), (0.5, 1.0), (0.6, 1.0))


class Set(NamedTuple):
    """Cosines: of anchors and embeddings, of two embeddings of an identity, and of two identities; and the mean cosine
    of two directions."""

    to_anchor: torch.Tensor
    genuine: torch.Tensor
    impostor: torch.Tensor
    directions: float


def people_apart(held_out: PersonEmbeddings, trained: PersonEmbeddings, images: int) -> tuple[torch.Tensor, int]:
    """Embeddings `(N, images + 1, D)` of the people with so many faces or more who are unlike those of the training,
    and how many were not."""

    def means(faces: PersonEmbeddings) -> torch.Tensor:
        _, person = faces.first.unique(return_inverse=True)
        sums = torch.zeros(faces.people, faces.embeddings.shape[1]).index_add_(0, person, faces.embeddings)
        return F.normalize(sums)

    near = largest_cosines(means(held_out), means(trained))[0] >= SAME
    starts, counts = held_out.first.unique(return_counts=True)
    enough = counts > images
    chosen = starts[enough & ~near]
    rows = chosen[:, None] + torch.arange(images + 1)
    return held_out.embeddings[rows], int((enough & near).sum())


def measure(anchors: torch.Tensor, embeddings: torch.Tensor) -> Set:
    """Of anchors `(N, D)` and embeddings `(N, images, D)`."""
    number, images, dimension = embeddings.shape
    cosines, directions = cosines_and_directions(anchors.repeat_interleave(images, dim=0), embeddings.flatten(0, 1))
    row, column = torch.triu_indices(images, images, offset=1)
    between = directions.view(number, images, dimension)
    between = (between @ between.mT)[:, row, column]
    first, second = torch.triu_indices(number, number, offset=1)
    apart = torch.cat([(embeddings[:, i] @ embeddings[:, i].T)[first, second] for i in range(images)])
    return Set(cosines, (embeddings @ embeddings.mT)[:, row, column].flatten(), apart, between.mean().item())


def perturbed(
    anchors: torch.Tensor,
    images: int,
    cosine_range: Sequence[float] | torch.Tensor,
    flow: IdentityFlow | None = None,
    shared: bool = False,
) -> torch.Tensor:
    """`(N, images, D)`, with noise that is `shared` among the embeddings of an anchor or independent."""
    keys = [(str(identity), image) for identity in range(len(anchors)) for image in range(images)]
    generators = [image_generator(0, *key, stream=PERTURBATION) for key in keys]
    rows = anchors.repeat_interleave(images, dim=0)
    common = [image_generator(0, identity, 0, stream=COMMON_PERTURBATION) for identity, _ in keys] if shared else ()
    turned, _ = perturb_embeddings(rows, cosine_range, generators, flow, common)
    return turned.view(len(anchors), images, -1)


def wasserstein(first: torch.Tensor, second: torch.Tensor) -> float:
    """The mean distance between the quantiles of two samples."""
    places = torch.linspace(0, 1, 1001)
    quantiles = [torch.quantile(each[torch.randperm(len(each))[:1_000_000]], places) for each in (first, second)]
    return (quantiles[0] - quantiles[1]).abs().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flow", type=Path, help="of training/train_identity_flow.py")
    parser.add_argument("--people", nargs="+", required=True, help="the caches of its training")
    parser.add_argument("--held-out", type=float, default=0.1, help="its --validation-share")
    parser.add_argument("--images", type=int, default=4, help="embeddings of each identity, beside the anchor")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    flow = load_identity_flow(args.flow)
    held_out = PersonEmbeddings(args.people, (0.0, args.held_out))
    real, alike = people_apart(held_out, PersonEmbeddings(args.people, (args.held_out, 1.0)), args.images)
    anchors, others = real[:, 0], real[:, 1:]
    print(
        f"{flow.num_parameters() / 1e6:.2f}M parameters; {len(real)} people held out, {alike} left out who look like"
    )
    print(f"one of the training (cosine of means >= {SAME}); {args.images} embeddings of each beside the anchor\n")
    faces = measure(anchors, others)
    print("| cosines | directions | W1 to the anchor | W1 genuine | mean genuine | EER | between directions |")
    print("|---|---|---|---|---|---|---|")

    def show(cosines: str, kind: str, made: Set) -> None:
        distances = (wasserstein(made.to_anchor, faces.to_anchor), wasserstein(made.genuine, faces.genuine))
        shown = " | ".join(f"{value:.3f}" for value in (*distances, made.genuine.mean()))
        rate = equal_error_rate(made.genuine.numpy(), made.impostor.numpy())
        print(f"| {cosines} | {kind} | {shown} | {100 * rate:.2f} % | {made.directions:.3f} |", flush=True)

    show("measured", "real faces", faces)
    # an untrained flow is IDperturb, whose directions agree by as much as their noise does
    uniform = IdentityFlow(anchors.shape[1], shared_noise=min(max(faces.directions, 0.0), 1.0))
    arms = {"flow": (flow, True), "flow, independent": (flow,)}
    arms |= {"IDperturb": (), "IDperturb, shared noise": (uniform, True)}
    same = torch.stack([faces.to_anchor, faces.to_anchor], dim=1)  # cosine by cosine as between the real faces
    for name, given in {"the same": same, **{f"{low} to {high}": (low, high) for low, high in RANGES}}.items():
        for kind, arm in arms.items():
            show(name, kind, measure(anchors, perturbed(anchors, args.images, given, *arm)))


if __name__ == "__main__":
    main()
