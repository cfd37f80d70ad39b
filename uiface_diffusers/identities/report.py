"""How near the identities of a bank are to each other and to known ones."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..encoders import check_same_encoder
from .bank import IdentityBank
from .selection import largest_cosines, nearest_others

# of cosines, for histograms
BIN_EDGES = np.linspace(-0.2, 1.0, 25)


@dataclass
class BankReport:
    """
    Args:
        nearest_other (`torch.Tensor` of shape `(N,)`): cosine of each identity to the nearest other one of its bank.
        duplicates (`list[tuple[str, str, float]]`): names and cosine of identities nearer than 0.99.
        nearest_known (`torch.Tensor` of shape `(N,)`, *optional*): cosine to the nearest known identity.
        known_names (`list[str]`): the names of those.
    """

    nearest_other: torch.Tensor
    duplicates: list[tuple[str, str, float]]
    nearest_known: torch.Tensor | None
    known_names: list[str]


def inspect_bank(bank: IdentityBank, known: IdentityBank | None = None) -> BankReport:
    """How near the identities of a bank (two or more) are to each other, and to known ones, such as those of the
    training. Of a bank with an embedding per image, every embedding counts, under its identity's name.

    Raises:
        ValueError: the two are of different encoders, or too small.
    """
    bank, known = bank.one_per_row(), None if known is None else known.one_per_row()
    if len(bank) < 2 or (known is not None and not len(known)):
        raise ValueError(
            f"the bank has {len(bank)} identities: two are needed to compare."
            if len(bank) < 2
            else "the known bank is empty: there is nothing to compare with."
        )
    if known is not None:
        check_same_encoder("the bank", bank.encoder_mark, "the known one", known.encoder_mark)
    embeddings = F.normalize(bank.embeddings)
    numbers = {name: i for i, name in enumerate(dict.fromkeys(bank.names))}
    labels = torch.tensor([numbers[name] for name in bank.names])
    nearest, positions = nearest_others(embeddings, labels)
    partners = positions.tolist()
    duplicates = [
        (bank.names[i], bank.names[j], cosine)
        for i, (j, cosine) in enumerate(zip(partners, nearest.tolist(), strict=True))
        if cosine > 0.99 and (i < j or partners[j] != i)
    ]
    if known is None:
        return BankReport(nearest, duplicates, None, [])
    cosines, positions = largest_cosines(embeddings, F.normalize(known.embeddings))
    return BankReport(nearest, duplicates, cosines, [known.names[i] for i in positions.tolist()])


def text_histogram(cosines: torch.Tensor) -> list[str]:
    """A line for each bin that is not empty: its lower edge, a bar, and the count. Cosines below -0.2 are in the
    first bin."""
    counts, _ = np.histogram(cosines.clamp(BIN_EDGES[0], BIN_EDGES[-1]), BIN_EDGES)
    bars = ["#" * int(np.ceil(50 * count / counts.max())) for count in counts]
    rows = zip(BIN_EDGES, bars, counts, strict=False)
    return [f"{low:5.2f} {bar:50} {count}" for low, bar, count in rows if count]
