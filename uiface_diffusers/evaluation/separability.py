"""How far apart are pairs of one identity (genuine) and pairs of two (impostors) in a recognizer's space?"""

from dataclasses import asdict, dataclass

import numpy as np
import torch

from ..faces import FaceEncoder
from .class_structure import class_centers, class_uniqueness, intra_class_consistency
from .figures import Description, Question
from .measure import Measure, conditions_of
from .plots import plot_histograms
from .verification import equal_error_rate, true_accept_rate

# rows of one gather: 65,536 pairs of 512 dimensions are 256 MiB
PAIRS_AT_ONCE = 65_536
# of cosines
QUANTILES = {"low": 0.05, "median": 0.5, "high": 0.95}


@dataclass
class Separability:
    """
    Args:
        eer (`float`): equal error rate.
        fmr100 (`float`): lowest false non-match rate (FNMR) at a false match rate (FMR) of at most 1 %.
        fmr1000 (`float`): the same at 0.1 %.
        fdr (`float`): Fisher discriminant ratio `(mu_g - mu_i)^2 / (var_g + var_i)`, variances of the population; not
            finite when no pair differs from another.
        genuine_mean (`float`), genuine_std (`float`), impostor_mean (`float`), impostor_std (`float`).
        genuine_low, genuine_median, genuine_high, impostor_low, impostor_median, impostor_high (`float`): quantiles of
            5, 50 and 95 %.
    """

    eer: float
    fmr100: float
    fmr1000: float
    fdr: float
    genuine_mean: float
    genuine_std: float
    impostor_mean: float
    impostor_std: float
    genuine_low: float
    genuine_median: float
    genuine_high: float
    impostor_low: float
    impostor_median: float
    impostor_high: float


def genuine_pairs(labels: np.ndarray, max_pairs: int | None = None, seed: int = 0) -> np.ndarray:
    """Pairs of two images of one identity, each pair once.

    Args:
        labels (`np.ndarray` of shape `(N,)`): the identities' numbers.
        max_pairs (*optional*): if there are more, so many of them are drawn, uniformly and without replacement.
        seed (`int`, defaults to 0): of the draw.

    Returns:
        `np.ndarray` of shape `(P, 2)`: positions.
    """
    order, ends = _by_identity(labels)
    following = np.arange(len(labels)) + 1
    return order[_draw_pairs(following, ends - following, max_pairs, seed)]


def impostor_pairs(labels: np.ndarray, max_pairs: int | None = None, seed: int = 0) -> np.ndarray:
    """Pairs of images of two identities; as `genuine_pairs`."""
    order, ends = _by_identity(labels)
    return order[_draw_pairs(ends, len(labels) - ends, max_pairs, seed)]


def _by_identity(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The positions ordered by identity and, for each in that order, where its identity ends."""
    order = np.argsort(labels, kind="stable")
    return order, np.searchsorted(labels[order], labels[order], side="right")


def _draw_pairs(first: np.ndarray, counts: np.ndarray, max_pairs: int | None, seed: int) -> np.ndarray:
    """Pairs (i, first[i] + k) with k < counts[i]. They are numbered, so that a few of billions can be drawn without a
    list of all."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    numbers = np.arange(total) if max_pairs is None or total <= max_pairs else None
    if numbers is None:
        drawn = np.random.default_rng(seed).choice(total, max_pairs, replace=False, shuffle=False)
        numbers = np.sort(drawn)
    i = np.searchsorted(ends, numbers, side="right")
    return np.stack([i, first[i] + numbers - (ends - counts)[i]], axis=1)


def pair_cosines(embeddings: torch.Tensor, pairs: np.ndarray) -> np.ndarray:
    """Cosines `(P,)` of pairs `(P, 2)` of embeddings `(N, D)` of unit length."""
    parts = [pairs[start : start + PAIRS_AT_ONCE] for start in range(0, len(pairs), PAIRS_AT_ONCE)]
    cosines = [(embeddings[part[:, 0]] * embeddings[part[:, 1]]).sum(dim=1) for part in parts]
    return torch.cat(cosines).numpy() if cosines else np.empty(0, np.float32)


def grouped_cosines(embeddings: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of all genuine and of all impostor pairs of embeddings `(N, M, D)`, M of each of N identities."""
    labels = np.arange(embeddings.shape[0]).repeat(embeddings.shape[1])
    genuine, impostor = (
        pair_cosines(embeddings.flatten(0, 1), draw(labels)) for draw in (genuine_pairs, impostor_pairs)
    )
    return genuine, impostor


def false_non_match_rate(genuine: np.ndarray, impostor: np.ndarray, false_match_rate: float) -> float:
    """The lowest share of genuine pairs that are rejected while at most a share of impostor pairs is accepted.

    Args:
        genuine (`np.ndarray` of shape `(N,)`): similarities of pairs of one person.
        impostor (`np.ndarray` of shape `(M,)`): of pairs of two.
        false_match_rate (`float`): in [0, 1).

    Raises:
        ValueError: there are no pairs of one of the two.
    """
    if not len(genuine) or not len(impostor):
        raise ValueError(f"{len(genuine)} genuine and {len(impostor)} impostor pairs: an error rate needs both.")
    return 1 - true_accept_rate(genuine, impostor, false_match_rate)[0]


def measure_separability(genuine: np.ndarray, impostor: np.ndarray) -> Separability:
    """Error rates and distributions of the similarities of genuine `(N,)` and impostor pairs `(M,)`.

    Raises:
        ValueError: there are no pairs of one of the two.
    """
    genuine, impostor = np.asarray(genuine, np.float64), np.asarray(impostor, np.float64)
    eer = equal_error_rate(genuine, impostor)
    distance, spread = genuine.mean() - impostor.mean(), genuine.var() + impostor.var()
    quantiles = {
        f"{kind}_{name}": float(np.quantile(scores, share))
        for kind, scores in (("genuine", genuine), ("impostor", impostor))
        for name, share in QUANTILES.items()
    }
    return Separability(
        eer=eer,
        fmr100=false_non_match_rate(genuine, impostor, 1e-2),
        fmr1000=false_non_match_rate(genuine, impostor, 1e-3),
        fdr=float(distance**2 / spread) if spread else float("inf"),
        genuine_mean=float(genuine.mean()),
        genuine_std=float(genuine.std()),
        impostor_mean=float(impostor.mean()),
        impostor_std=float(impostor.std()),
        **quantiles,
    )


class SeparabilityMeasure(Measure):
    """How well each recognizer tells the identities apart."""

    needs = ("recognizers",)
    figures = {
        "eer": Description(
            "Equal error rate",
            "%",
            "The error rate at the threshold where as many genuine pairs are rejected as impostor pairs are"
            " accepted. Lower is better.",
            Question.DISTINCT,
            headline=True,
        ),
        "fmr100": Description(
            "FMR100",
            "%",
            "Share of genuine pairs rejected when at most 1 % of impostor pairs are accepted. Lower is better.",
            Question.DISTINCT,
        ),
        "fmr1000": Description(
            "FMR1000",
            "%",
            "Share of genuine pairs rejected when at most 0.1 % of impostor pairs are accepted. Lower is better.",
            Question.DISTINCT,
        ),
        "fdr": Description(
            "Fisher discriminant ratio",
            "",
            "Squared distance between the two means, divided by the sum of the two variances. Higher is better.",
            Question.DISTINCT,
        ),
        "genuine_mean": Description(
            "Mean of genuine pairs",
            "",
            "Cosine of two images of one identity.",
            Question.ONE_PERSON,
        ),
        "genuine_std": Description(
            "Deviation of genuine pairs",
            "",
            "Standard deviation of the cosines of genuine pairs.",
            Question.ONE_PERSON,
        ),
        "impostor_mean": Description(
            "Mean of impostor pairs",
            "",
            "Cosine of images of two identities. Strangers have about 0.",
            Question.DISTINCT,
        ),
        "impostor_std": Description(
            "Deviation of impostor pairs",
            "",
            "Standard deviation of the cosines of impostor pairs.",
            Question.DISTINCT,
        ),
        **{
            f"{kind}_{name}": Description(
                f"{100 * share:.0f} % quantile of {kind} pairs",
                "",
                f"This share of {kind} pairs has a lower cosine.",
                question,
            )
            for kind, question in (("genuine", Question.ONE_PERSON), ("impostor", Question.DISTINCT))
            for name, share in QUANTILES.items()
        },
        "uniqueness": Description(
            "Uniqueness",
            "%",
            "Share of distinct identities: going through them in order, one is dropped when the cosine of its mean"
            " embedding to one kept before reaches the threshold (DCFace's U_class). Falls as identities are added.",
            Question.DISTINCT,
            headline=True,
        ),
        "consistency": Description(
            "Intra-class consistency",
            "%",
            "Share of an identity's images whose cosine to its mean embedding exceeds the threshold, averaged over"
            " identities (DCFace's C_intra). Each image is part of that mean, so with few images per identity even"
            " strangers pass.",
            Question.ONE_PERSON,
        ),
        "consistency_others": Description(
            "Consistency, left out of the mean",
            "%",
            "The same, but each image is compared with the mean of the identity's other images.",
            Question.ONE_PERSON,
            headline=True,
        ),
        "impostors_above": Description(
            "Impostor pairs above the threshold",
            "%",
            "How often this recognizer takes two identities for one at the threshold.",
            Question.DISTINCT,
        ),
    }

    def measure(self) -> None:
        for recognizer in self.inputs.recognizers:
            self._by(recognizer, self.inputs.embeddings[recognizer.name])

    def _by(self, recognizer: FaceEncoder, embeddings: torch.Tensor) -> None:
        faces, settings, conditions = self.inputs.faces, self.settings, conditions_of(recognizer)
        labels, threshold = faces.labels, settings.threshold
        genuine, impostor = (
            pair_cosines(embeddings, pairs(labels.numpy(), settings.max_pairs, settings.seed))
            for pairs in (genuine_pairs, impostor_pairs)
        )
        pairs = f"Of {len(genuine):,} genuine and {len(impostor):,} impostor pairs."
        self.add(asdict(measure_separability(genuine, impostor)), conditions, pairs)

        conditions = conditions | {"threshold": threshold}
        # these two depend on the set's size
        uniqueness = class_uniqueness(class_centers(embeddings, labels), threshold)
        self.add({"uniqueness": uniqueness}, conditions | {"identities": len(faces.identities)})
        consistency, _ = intra_class_consistency(embeddings, labels, threshold)
        self.add({"consistency": consistency}, conditions | {"images of each": faces.images_of_each})
        of_others, to_others = intra_class_consistency(embeddings, labels, threshold, leave_one_out=True)
        above = float((impostor > threshold).mean())
        self.add({"consistency_others": of_others, "impostors_above": above}, conditions)

        cosines: dict[str, np.ndarray | torch.Tensor] = {"genuine pairs": genuine, "impostor pairs": impostor}
        cosines["image to the mean of the others"] = to_others
        plot = plot_histograms(cosines, "cosine", {"threshold": threshold})
        self.pictures.append((f"Similarities by {recognizer.name}", plot))
