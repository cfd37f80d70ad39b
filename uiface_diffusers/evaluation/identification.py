"""Open-set identification, 1:N: which person of a gallery is this, if any? Terms and measures are those of
ISO/IEC 19795-1 and of NIST's FRTE 1:N reports."""

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ..faces import has_direction
from ..files import complete_file, write_json
from .intervals import accept_interval, wilson_interval
from .verification import true_accept_rate

FALSE_POSITIVE_RATES = (1e-2, 1e-3)
RANKS = (1, 5, 10)
# one block of scores is 64 MiB
GALLERY_ROWS, PROBE_ROWS = 8192, 1024
# steps of a unit vector's components
GRID = 2.0**26


class IdentificationRate(NamedTuple):
    """A share of the mated searches and its 95 % interval; the cosine threshold, none for a rank's."""

    rate: float
    low: float
    high: float
    threshold: float | None = None


def exact_unit_vectors(embeddings: np.ndarray) -> np.ndarray:
    """Embeddings at unit length, in float64, rounded to multiples of 2^-26: then products are multiples of 2^-52, and
    float64 holds every partial sum exactly. The cosine of two vectors does not depend on the order of summation, so
    not on block sizes, threads or the BLAS, and equal embeddings tie exactly. Rounding moves a cosine by about 1e-8.

    Args:
        embeddings (`np.ndarray` of shape `(N, D)`): finite and not zero.
    """
    embeddings = np.asarray(embeddings, np.float64)
    return np.round(embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True) * GRID) / GRID


@dataclass
class IdentificationResult:
    """The searches of a gallery, of which every measure is computed.

    Args:
        mated_scores (`np.ndarray` of shape `(M,)`): cosine of each mated probe to its own identity in the gallery.
        mated_ranks (`np.ndarray` of shape `(M,)`): the number of identities that score at least as much as its own,
            which counts too: 1 is the best. A tie counts against the recognizer.
        non_mated_scores (`np.ndarray` of shape `(K,)`): the highest cosine of each probe of nobody in the gallery.
        identities (`int`): in the gallery.
        references (`int`): faces in the gallery.
        rank (`int`, *optional*): a mate counts as found up to this rank; at any rank if None.
    """

    mated_scores: np.ndarray
    mated_ranks: np.ndarray
    non_mated_scores: np.ndarray
    identities: int
    references: int
    rank: int | None = 1

    @property
    def found_scores(self) -> np.ndarray:
        """`(M,)`: the mated scores, `-inf` where the mate's rank is beyond `rank`."""
        if self.rank is None:
            return self.mated_scores
        return np.where(self.mated_ranks <= self.rank, self.mated_scores, -np.inf)

    def fpir(self, threshold: float) -> float:
        """False positive identification rate: the share of non-mated searches that return a candidate at or above
        the threshold."""
        return float(np.mean(self.non_mated_scores >= threshold))

    def fnir(self, threshold: float) -> float:
        """False negative identification rate: the share of mated searches whose mate is below the threshold or beyond
        `rank`."""
        return float(np.mean(self.found_scores < threshold))

    def rank_rate(self, rank: int) -> IdentificationRate:
        """The share of mated searches whose mate has at most this rank, at any score: closed-set rank-k."""
        rate = float(np.mean(self.mated_ranks <= rank))
        return IdentificationRate(rate, *wilson_interval(rate, len(self.mated_ranks)))

    def tpir_at(self, fpir: float) -> IdentificationRate | None:
        """True positive identification rate, 1 - FNIR, at the lowest threshold whose FPIR is at most `fpir`; None
        where that would be less than one non-mated search."""
        if fpir * len(self.non_mated_scores) < 1:
            return None
        rate, highest = true_accept_rate(self.found_scores, self.non_mated_scores, fpir)
        interval = accept_interval(self.found_scores, self.non_mated_scores, fpir)
        return IdentificationRate(rate, *interval, float(np.nextafter(highest, np.inf)))

    def det(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The detection error trade-off: FPIR, FNIR and threshold, one point per distinct score, the highest
        first, after a point above all of them.

        Raises:
            ValueError: there are no non-mated searches.
        """
        if not len(self.non_mated_scores):
            raise ValueError("no probe is of a person outside the gallery: FPIR and a DET curve need some.")
        found, others = np.sort(self.found_scores), np.sort(self.non_mated_scores)
        scores = np.unique(np.concatenate([self.mated_scores, others]))[::-1]
        thresholds = np.append(np.inf, scores)
        fpir = 1 - np.searchsorted(others, thresholds) / len(others)
        return fpir, np.searchsorted(found, thresholds) / len(found), thresholds

    def to_dict(self) -> dict:
        """What JSON can hold; counts in place of the scores."""
        tpir = {f"{fpir:g}": self.tpir_at(fpir) for fpir in FALSE_POSITIVE_RATES}
        return {
            "identities": self.identities,
            "references": self.references,
            "mated": len(self.mated_scores),
            "non_mated": len(self.non_mated_scores),
            "rank": self.rank,
            "tpir_at_fpir": {fpir: rate._asdict() for fpir, rate in tpir.items() if rate is not None},
            "rank_rates": {str(rank): self.rank_rate(rank)._asdict() for rank in RANKS},
        }

    def lines(self) -> list[str]:
        """A text of a few lines, in percent."""
        at_rank = "at any rank" if self.rank is None else f"within rank {self.rank}"
        text = [
            f"{self.references} faces of {self.identities} people in the gallery; {len(self.mated_scores)} mated and"
            f" {len(self.non_mated_scores)} non-mated searches"
        ]
        for fpir in FALSE_POSITIVE_RATES:
            rate = self.tpir_at(fpir)
            shown = (
                "- (too few non-mated searches)" if rate is None else f"{_percent(rate)}, cosine {rate.threshold:.4f}"
            )
            text.append(f"TPIR at FPIR {fpir:g}, {at_rank}: {shown}")
        return text + [f"rank-{rank}: {_percent(self.rank_rate(rank))}" for rank in RANKS]


def _percent(rate: IdentificationRate) -> str:
    return f"{100 * rate.rate:.2f} [{100 * rate.low:.2f}, {100 * rate.high:.2f}]"


def _checked(name: str, embeddings: np.ndarray, identities: Sequence[Hashable]) -> np.ndarray:
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2 or len(embeddings) != len(identities) or not len(embeddings):
        raise ValueError(f"the {name} has {embeddings.shape} embeddings and {len(identities)} identities.")
    wrong = np.flatnonzero(~has_direction(embeddings))
    if len(wrong):
        raise ValueError(f"{len(wrong)} embeddings of the {name} are zero or not finite, such as in row {wrong[0]}.")
    return embeddings


def check_mated(gallery_identities: Sequence[Hashable], probe_identities: Sequence[Hashable]) -> None:
    """
    Raises:
        ValueError: no probe is of a person in the gallery.
    """
    if set(gallery_identities).isdisjoint(probe_identities):
        raise ValueError(
            f"none of {len(probe_identities)} probes is of a person in the gallery, such as"
            f" `{probe_identities[0]}`: a person's name has to be the same in both."
        )


def _mate_scores(probes: np.ndarray, mates: np.ndarray, references_of: Callable[[int], np.ndarray]) -> np.ndarray:
    """The highest cosine of each probe to the references of its mate; `inf` where `mates` is -1."""
    scores = np.full(len(probes), np.inf)
    order = np.argsort(mates, kind="stable")
    numbers, starts = np.unique(mates[order], return_index=True)
    for number, rows in zip(numbers, np.split(order, starts[1:]), strict=True):
        if number >= 0:
            references = exact_unit_vectors(references_of(number))
            scores[rows] = (exact_unit_vectors(probes[rows]) @ references.T).max(axis=1)
    return scores


def measure_identification(
    gallery: np.ndarray,
    gallery_identities: Sequence[Hashable],
    probes: np.ndarray,
    probe_identities: Sequence[Hashable],
    rank: int | None = 1,
    gallery_rows: int = GALLERY_ROWS,
    probe_rows: int = PROBE_ROWS,
) -> IdentificationResult:
    """Searches every probe in a gallery, in blocks. An identity's score is the highest of its references. A probe is
    mated if its identity is in the gallery.

    Args:
        gallery (`np.ndarray` of shape `(G, D)`): embeddings of any length.
        gallery_identities: whose they are, G names or numbers.
        probes (`np.ndarray` of shape `(P, D)`): embeddings of any length.
        probe_identities: whose they are.
        rank (`int`, *optional*, defaults to 1): a mate counts as found up to this rank; at any rank if None.
        gallery_rows (`int`, defaults to 8192): references of a block; an identity is never divided.
        probe_rows (`int`, defaults to 1024): probes of a block. The result is the same for blocks of any size.

    Raises:
        ValueError: numbers or dimensions disagree, an embedding is zero or not finite, or no probe is mated.
    """
    gallery = _checked("gallery", gallery, gallery_identities)
    probes = _checked("set of probes", probes, probe_identities)
    if gallery.shape[1] != probes.shape[1]:
        raise ValueError(f"gallery and probes have {gallery.shape[1]} and {probes.shape[1]} dimensions.")
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` counts from 1, but is {rank}.")
    numbers: dict[Hashable, int] = {}
    labels = np.array([numbers.setdefault(name, len(numbers)) for name in gallery_identities])
    mates = np.array([numbers.get(name, -1) for name in probe_identities])
    mated = mates >= 0
    check_mated(gallery_identities, probe_identities)
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(len(numbers) + 1))
    mate_scores = _mate_scores(probes, mates, lambda mate: gallery[order[starts[mate] : starts[mate + 1]]])
    at_least, highest = np.zeros(len(probes), int), np.full(len(probes), -np.inf)
    with tqdm(total=len(gallery), desc="search", unit="reference") as progress:
        first = 0
        while first < len(numbers):
            last = max(first + 1, int(np.searchsorted(starts, starts[first] + gallery_rows, side="right")) - 1)
            references = exact_unit_vectors(gallery[order[starts[first] : starts[last]]])
            for start in range(0, len(probes), probe_rows):
                part = slice(start, start + probe_rows)
                scores = exact_unit_vectors(probes[part]) @ references.T
                if len(references) > last - first:
                    scores = np.maximum.reduceat(scores, starts[first:last] - starts[first], axis=1)
                at_least[part] += np.count_nonzero(scores >= mate_scores[part, None], axis=1)
                np.maximum(highest[part], scores.max(axis=1), out=highest[part])
            progress.update(len(references))
            first = last
    return IdentificationResult(mate_scores[mated], at_least[mated], highest[~mated], len(numbers), len(gallery), rank)


def save_identification(result: IdentificationResult, name: str, output: str | os.PathLike, **notes: object) -> None:
    """Writes `identification.json`, with `notes`, and the DET curve, `det.png`, of a recognizer `name` into a folder.
    Without non-mated searches there is no curve."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "identification.json", {"recognizer": name, **result.to_dict(), **notes})
    if not len(result.non_mated_scores):
        return
    from matplotlib.figure import Figure  # of the extra `train`; without pyplot it needs no display

    fpir, fnir, _ = result.det()
    shown = (fpir > 0) & (fnir > 0)  # a logarithm has no place for the others
    figure = Figure()
    axis = figure.subplots()
    axis.step(fpir[shown], fnir[shown], where="post")
    axis.set(xscale="log", yscale="log", xlabel="false positive identification rate", title=name)
    axis.set_ylabel("false negative identification rate" + (f", rank {result.rank}" if result.rank else ""))
    axis.grid(alpha=0.3)
    with complete_file(output / "det.png") as beside:
        figure.savefig(beside, format="png", dpi=150)
