"""The order in which faces are trained on, and how often each is drawn."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from ..faces import SIDE_VIEW
from ..seeds import mix_seed


class EndlessBatchSampler(Sampler):
    """Batches of one process, epoch after epoch, from batch `start` on. An epoch's order depends on seed and epoch
    only, so that a resumed run sees what it has not seen yet; processes take turns in that order.

    Args:
        length (`int`): samples in an epoch.
        batch_size (`int`): of one process.
        seed (`int`): of the order.
        rank (`int`): this process.
        world_size (`int`): number of processes.
        start (`int`): batches that this process has seen already.
        weights (`torch.Tensor` of shape `(length,)`, *optional*): how often each sample is drawn, relative to the
            others. By default, every sample once per epoch.

    Raises:
        ValueError: the samples do not fill one batch of every process.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        weights: torch.Tensor | None = None,
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start
        self.weights = weights
        self.batches_per_epoch = length // (batch_size * world_size)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"{length} faces do not fill {world_size} batch(es) of {batch_size}: lower --train-batch-size."
            )

    def _order(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        if self.weights is None:
            return torch.randperm(self.length, generator=generator)
        return torch.multinomial(self.weights, self.length, replacement=True, generator=generator)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = divmod(self.start, self.batches_per_epoch)
        while True:
            order = self._order(epoch)
            for batch in range(position, self.batches_per_epoch):
                first = (batch * self.world_size + self.rank) * self.batch_size
                yield order[first : first + self.batch_size].tolist()
            epoch, position = epoch + 1, 0


class NumberedBatches(EndlessBatchSampler):
    """The same batches; beside every sample its number in the whole training, which does not depend on how the samples
    are shared among processes."""

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:  # type: ignore[override]  # what `LabeledFaces` fetches
        for batch, indices in enumerate(super().__iter__(), start=self.start):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield list(zip(indices, range(first, first + self.batch_size), strict=True))


def sampling_weights(
    names: Sequence[str],
    lengths: Sequence[int],
    poses: np.ndarray | None = None,
    balanced: bool = False,
    shares: Sequence[float] | None = None,
    side_view_share: float | None = None,
) -> torch.Tensor | None:
    """How often each face of several caches is drawn, for `EndlessBatchSampler`: the product of a factor of its
    identity (one over its number of faces, if balanced), one of its cache and one of its pose. The latter two are such
    that caches and side views get their shares of what is drawn, both at once, by iterative proportional fitting
    (Deming & Stephan 1940).

    Args:
        names: the identity of each face, another one in each cache.
        lengths: faces of each cache, in the order of `names`.
        poses (`np.ndarray` of shape `(N, 2)`, *optional*): `FaceCache.poses`, for `side_view_share`. Faces whose pose
            is not known (NaN) count as no side views.
        balanced (`bool`, defaults to `False`): every identity as often, but for the shares.
        shares (*optional*): how much of what is drawn is of each cache, relative to the others; in proportion to the
            weights of their faces if not given.
        side_view_share (`float`, *optional*): how much of what is drawn looks sideways, |yaw| > 0.25.

    Returns:
        `torch.Tensor` of shape `(N,)`, or `None` if all faces are drawn alike.

    Raises:
        ValueError: no pose is known, or the faces do not allow the shares.
    """
    if not balanced and shares is None and side_view_share is None:
        return None
    weights = np.ones(len(names))
    if balanced:
        _, numbers, counts = np.unique(names, return_inverse=True, return_counts=True)
        weights = 1 / counts[numbers]
    cache = np.repeat(np.arange(len(lengths)), lengths)
    margins = []  # the group of each face, the share of each group
    if shares is not None:
        margins.append((cache, np.array(shares) / np.sum(shares)))
    if side_view_share is not None:
        yaws = np.full(len(names), np.nan) if poses is None else poses[:, 0]
        if np.isnan(yaws).all():
            raise ValueError(
                "a share of side views (--side-view-share) needs head poses, which these caches lack: run `uiface"
                " prepare` of this version on the photographs, without --aligned, into a new folder."
            )
        sideways = (np.abs(yaws) > SIDE_VIEW).astype(int)
        margins.append((sideways, np.array([1 - side_view_share, side_view_share])))
    for _ in range(200):
        for groups, wanted in margins:
            totals = np.bincount(groups, weights, minlength=len(wanted))
            weights = weights * np.divide(wanted, totals, out=np.zeros(len(wanted)), where=totals > 0)[groups]
    for groups, wanted in margins:
        if not np.allclose(np.bincount(groups, weights, minlength=len(wanted)), wanted, atol=1e-3):
            of_caches = f"caches of {list(lengths)} faces"
            if side_view_share is not None:
                of_caches += f" with {np.bincount(cache, sideways, len(lengths)).astype(int).tolist()} side views"
            raise ValueError(
                f"the shares (--train-data-shares {shares}, --side-view-share {side_view_share}) cannot be had from"
                f" {of_caches}: choose others."
            )
    return torch.from_numpy(weights)


def set_weights(lengths: Sequence[int], weights: Sequence[float] | None) -> torch.Tensor | None:
    """How often each face of several sets is drawn, for `EndlessBatchSampler`: as its set's weight says, relative to
    the faces of the other sets.

    Args:
        lengths: faces of each set.
        weights: one per set, above 0.

    Returns:
        `torch.Tensor` of shape `(sum(lengths),)`, or `None` if all faces are drawn alike: each once per epoch.

    Raises:
        ValueError: there are more faces than torch can draw from.
    """
    if weights is None or len(set(weights)) == 1:
        return None
    if sum(lengths) > 2**24:
        raise ValueError(f"--train-data-weights can draw from {2**24} faces at most, these are {sum(lengths)}.")
    return torch.tensor(weights, dtype=torch.float64).repeat_interleave(torch.tensor(lengths))
