"""Identities that are unlike each other and unlike known ones."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from ..encoders import check_same_encoder
from .bank import IdentityBank

# how often `sample_identities` draws as many candidates as are asked for
MAX_ROUNDS = 100
# rows of one matrix product: 1024 x 16384 cosines are 64 MiB
CANDIDATE_ROWS, KNOWN_ROWS = 1024, 16384


def check_same_dimension(dimension: int, other: int) -> None:
    """
    Raises:
        ValueError: embeddings of the two cannot be compared.
    """
    if dimension != other:
        raise ValueError(f"embeddings of {dimension} and of {other} numbers cannot be compared: give one encoder's.")


def largest_cosines(embeddings: torch.Tensor, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine to, and position of, the nearest known embedding, in blocks: the full matrix is never held.

    Args:
        embeddings (`torch.Tensor` of shape `(N, D)`): of unit length.
        known (`torch.Tensor` of shape `(M, D)`): of unit length; may be empty.

    Returns:
        Two tensors of shape `(N,)`: cosines (-1 without known embeddings) and positions.

    Raises:
        ValueError: the dimensions differ.
    """
    check_same_dimension(embeddings.shape[1], known.shape[1])
    cosines = embeddings.new_full((len(embeddings),), -1.0)
    positions = torch.zeros(len(embeddings), dtype=torch.long)
    for start in range(0, len(embeddings), CANDIDATE_ROWS):
        rows = slice(start, start + CANDIDATE_ROWS)
        for first in range(0, len(known), KNOWN_ROWS):
            values, nearest = (embeddings[rows] @ known[first : first + KNOWN_ROWS].T).max(dim=1)
            nearer = values > cosines[rows]
            cosines[rows] = torch.where(nearer, values, cosines[rows])
            positions[rows] = torch.where(nearer, nearest + first, positions[rows])
    return cosines, positions


def nearest_others(embeddings: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine to, and position of, the nearest embedding of another identity.

    Args:
        embeddings (`torch.Tensor` of shape `(N, D)`): of unit length.
        labels (`torch.Tensor` of shape `(N,)`): equal ones are of one identity.

    Returns:
        Two tensors of shape `(N,)`: cosines (-1 where there is no other identity) and positions.
    """
    nearest, partners = [], []
    for start in range(0, len(embeddings), CANDIDATE_ROWS):
        similarity = embeddings[start : start + CANDIDATE_ROWS] @ embeddings.T
        similarity[labels[start : start + CANDIDATE_ROWS, None] == labels] = -1  # not to itself
        values, positions = similarity.max(dim=1)
        nearest.append(values)
        partners.append(positions)
    return torch.cat(nearest), torch.cat(partners)


class DistinctIdentities:
    """Keeps embeddings greedily, in the order that they come: one whose cosine to an excluded or to a kept embedding
    is `max_similarity` or more falls (Kim et al. 2023).

    Args:
        excluded (`torch.Tensor` of shape `(M, D)`): of unit length, as the training identities; may be empty.
        max_similarity (`float`): in (-1, 1].
        number (`int`, *optional*): stop at so many.
    """

    def __init__(self, excluded: torch.Tensor, max_similarity: float, number: int | None = None):
        self.excluded, self.max_similarity, self.number = excluded, max_similarity, number
        self.kept = excluded.new_empty(0, excluded.shape[1])
        self.report = {"candidates": 0, "kept": 0, "near an excluded identity": 0, "near a kept identity": 0}

    @property
    def complete(self) -> bool:
        return self.number is not None and len(self.kept) >= self.number

    def add(self, candidates: torch.Tensor) -> torch.Tensor:
        """Takes candidates `(N, D)` of unit length; returns which of them are kept, `(N,)`. Those that come after the
        last one wanted are not looked at."""
        taken = torch.zeros(len(candidates), dtype=torch.bool)
        for start in range(0, len(candidates), CANDIDATE_ROWS):
            rows = candidates[start : start + CANDIDATE_ROWS]
            near_excluded = largest_cosines(rows, self.excluded)[0] >= self.max_similarity
            near_kept = largest_cosines(rows, self.kept)[0] >= self.max_similarity
            near_each_other = rows @ rows.T >= self.max_similarity
            chosen: list[int] = []
            for i in range(len(rows)):
                if self.number is not None and len(self.kept) + len(chosen) >= self.number:
                    break
                self.report["candidates"] += 1
                if near_excluded[i]:
                    self.report["near an excluded identity"] += 1
                elif near_kept[i]:
                    self.report["near a kept identity"] += 1
                else:
                    chosen.append(i)
                    near_kept |= near_each_other[i]
            taken[[start + i for i in chosen]] = True
            self.kept = torch.cat([self.kept, rows[chosen]])
            self.report["kept"] = len(self.kept)
        return taken


def join_embeddings(banks: Sequence[IdentityBank], dimension: int) -> torch.Tensor:
    """The embeddings of all banks, `(N, dimension)`, of unit length."""
    banks = [bank.one_per_row() for bank in banks]
    for bank in banks:
        check_same_dimension(bank.embeddings.shape[1], dimension)
    return torch.cat([torch.empty(0, dimension), *(F.normalize(bank.embeddings) for bank in banks)])


def keep_distinct(
    bank: IdentityBank, exclude: Sequence[IdentityBank] = (), max_similarity: float = 0.3, number: int | None = None
) -> tuple[IdentityBank, dict[str, int]]:
    """The identities of a bank, in its order, that are unlike each other and unlike the excluded ones; and the report
    of `DistinctIdentities`."""
    bank.check_one_each("the choice of distinct identities")
    for other in exclude:
        check_same_encoder("the bank", bank.encoder_mark, "an excluded bank", other.encoder_mark)
    distinct = DistinctIdentities(join_embeddings(exclude, bank.embeddings.shape[1]), max_similarity, number)
    taken = distinct.add(F.normalize(bank.embeddings))
    return bank.take(taken.nonzero().flatten().tolist()), distinct.report


def sample_identities(bank: IdentityBank, number: int, max_similarity: float = 0.3, seed: int = 0) -> IdentityBank:
    """New identities: unit directions drawn from the Gaussian distribution of a bank's embeddings.

    Each is kept when its cosine to every embedding of the bank and to every one kept before is below `max_similarity`.
    Weaker than identities embedded from generated faces (UIFace's authors): a direction need not be a face's.

    Args:
        bank: the training embeddings, at least two, of unit length.
        number (`int`): how many.
        max_similarity (`float`, defaults to 0.3): as of DCFace (Kim et al. 2023).
        seed (`int`, defaults to 0): of the draws.

    Raises:
        ValueError: so many do not fit, or the bank is too small.
    """
    bank = bank.one_per_row()
    if len(bank) < 2:
        raise ValueError(f"a distribution needs two embeddings or more; the bank has {len(bank)}.")
    known = F.normalize(bank.embeddings)
    mean, centered = known.mean(dim=0), known - known.mean(dim=0)
    # a standard normal vector times the covariance's root has that covariance
    values, vectors = torch.linalg.eigh((centered.T @ centered).double() / (len(known) - 1))
    root = (vectors * values.clamp(min=0).sqrt()).T.float()
    generator = torch.Generator().manual_seed(seed)
    distinct = DistinctIdentities(known, max_similarity, number)
    for _ in range(MAX_ROUNDS):
        distinct.add(F.normalize(mean + torch.randn(number, len(root), generator=generator) @ root))
        if distinct.complete:
            return replace(bank, embeddings=distinct.kept, names=[])
    raise ValueError(
        f"only {len(distinct.kept)} of {number} identities with a cosine below {max_similarity} to each other and to"
        f" the bank were found in {MAX_ROUNDS * number} draws: allow a larger one."
    )
