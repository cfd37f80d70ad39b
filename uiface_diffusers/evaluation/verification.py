"""Verification: are two faces of one person? The protocol of LFW (Huang et al. 2007, View 2) as InsightFace measures
it, whose figures the field compares."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.benchmarks import Benchmark, read_benchmarks
from ..data.pairs import NUM_FOLDS
from ..faces import Recognizer, has_direction
from ..files import complete_file, write_json
from .embedding import embed_faces
from .intervals import wilson_interval

# squared distances of unit vectors
THRESHOLDS = np.arange(0, 4, 0.01)
FALSE_ACCEPT_RATES = (1e-1, 1e-2, 1e-3, 1e-4)


class TrueAcceptRate(NamedTuple):
    """Share of the genuine pairs above the cosine `threshold`, and its 95 % interval."""

    rate: float
    low: float
    high: float
    threshold: float


@dataclass
class VerificationResult:
    """
    Args:
        fold_accuracies (`np.ndarray` of shape `(10,)`): share of a fold's pairs that are told right, at the threshold
            that is best on the other nine.
        threshold (`float`): mean cosine of those thresholds.
        eer (`float`): equal error rate.
        tar_at_far (`dict[float, TrueAcceptRate]`): false accept rate -> true accept rate. Rates that would be less
            than one impostor pair are left out.
        genuine (`np.ndarray` of shape `(N,)`): cosines of the pairs of one person.
        impostor (`np.ndarray` of shape `(M,)`): of the others.
        right (`np.ndarray` of shape `(N + M,)`): booleans, whether each pair is told right, in the benchmark's order.
    """

    fold_accuracies: np.ndarray
    threshold: float
    eer: float
    tar_at_far: dict[float, TrueAcceptRate]
    genuine: np.ndarray
    impostor: np.ndarray
    right: np.ndarray

    @property
    def accuracy(self) -> float:
        return float(self.fold_accuracies.mean())

    @property
    def accuracy_std(self) -> float:
        """Standard deviation over the folds, of the population, as numpy's and InsightFace's."""
        return float(self.fold_accuracies.std())

    def to_dict(self) -> dict:
        """What JSON can hold; counts in place of the cosines."""
        return {
            "accuracy": self.accuracy,
            "accuracy_std": self.accuracy_std,
            "fold_accuracies": self.fold_accuracies.tolist(),
            "threshold": self.threshold,
            "eer": self.eer,
            "tar_at_far": {f"{far:g}": value._asdict() for far, value in self.tar_at_far.items()},
            "genuine_pairs": len(self.genuine),
            "impostor_pairs": len(self.impostor),
        }


def roc(genuine: np.ndarray, impostor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The curve of (false accept rate, true accept rate) from (0, 0) to (1, 1), a point a distinct similarity; pairs
    at least as similar are accepted."""
    thresholds = np.append(np.inf, np.unique(np.concatenate([genuine, impostor]))[::-1])
    rates = [1 - np.searchsorted(np.sort(scores), thresholds) / len(scores) for scores in (impostor, genuine)]
    return rates[0], rates[1]


def equal_error_rate(genuine: np.ndarray, impostor: np.ndarray) -> float:
    """The error rate at the threshold where as many genuine pairs are rejected as impostor pairs accepted; between two
    thresholds, linearly interpolated.

    Args:
        genuine (`np.ndarray` of shape `(N,)`): similarities of pairs of one person.
        impostor (`np.ndarray` of shape `(M,)`): of pairs of two.

    Returns:
        In [0, 1].

    Raises:
        ValueError: one of the two is empty.
    """
    if not len(genuine) or not len(impostor):
        raise ValueError(f"{len(genuine)} genuine and {len(impostor)} impostor pairs: an error rate needs both.")
    accepted, right = roc(genuine, impostor)
    rejected = 1 - right
    # rejected falls, accepted rises along the curve
    after = int(np.argmax(accepted >= rejected))
    before = max(after - 1, 0)
    gap_before, gap_after = rejected[before] - accepted[before], rejected[after] - accepted[after]
    share = 0.0 if gap_before == gap_after else gap_before / (gap_before - gap_after)
    return float(accepted[before] + share * (accepted[after] - accepted[before]))


def true_accept_rate(genuine: np.ndarray, impostor: np.ndarray, far: float) -> tuple[float, float]:
    """The largest share of genuine pairs that a threshold accepts which accepts at most the share `far`, below 1, of
    the impostor pairs; and that threshold: what is more similar is accepted."""
    # products can lie just below a whole number, as 0.29 * 100 does
    accepted = int(far * len(impostor) + 1e-9)
    threshold = np.partition(impostor, len(impostor) - accepted - 1)[len(impostor) - accepted - 1]
    return float(np.mean(genuine > threshold)), float(threshold)


def true_accept_interval(
    genuine: np.ndarray, impostor: np.ndarray, far: float, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % bootstrap interval of `true_accept_rate`. Genuine and impostor pairs are resampled, so that it covers
    the threshold too, which at a low rate hangs on a few impostors. Pairs are taken as independent, though some share
    a photograph. It is never narrower than Wilson's interval at the measured threshold: of pairs that are all right,
    every resample is all right, too."""
    generator = np.random.default_rng(seed)
    rates = [
        true_accept_rate(
            genuine[generator.integers(len(genuine), size=len(genuine))],
            impostor[generator.integers(len(impostor), size=len(impostor))],
            far,
        )[0]
        for _ in range(num_resamples)
    ]
    low, high = np.quantile(rates, [0.025, 0.975])
    bounds = wilson_interval(true_accept_rate(genuine, impostor, far)[0], len(genuine))
    return min(float(low), bounds[0]), max(float(high), bounds[1])


def fold_accuracies(
    distances: np.ndarray, same: np.ndarray, thresholds: np.ndarray = THRESHOLDS, num_folds: int = NUM_FOLDS
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy on each of consecutive folds at the threshold that is best on all others, the smallest of several.

    Args:
        distances (`np.ndarray` of shape `(N,)`): squared, of unit vectors; pairs nearer than a threshold are accepted.
        same (`np.ndarray` of shape `(N,)`): booleans.
        thresholds (`np.ndarray` of shape `(T,)`): to choose from. The default is InsightFace's grid, 0 to 4 by 0.01,
            with which published figures were measured. To choose from all distances gave the same on LFW, to 1e-6.
        num_folds (`int`, defaults to 10): the first ones have a pair more if N cannot be divided.

    Returns:
        Accuracies and thresholds, `(num_folds,)` each.

    Raises:
        ValueError: there are fewer pairs than folds.
    """
    if len(same) < num_folds:
        raise ValueError(f"{len(same)} pairs cannot be split into {num_folds} folds.")
    right = (distances[:, None] < thresholds) == same[:, None]
    folds = np.array_split(right, num_folds)
    counts = np.stack([fold.sum(axis=0) for fold in folds])
    best = (counts.sum(axis=0) - counts).argmax(axis=1)
    accuracies = [fold[:, position].mean() for fold, position in zip(folds, best, strict=True)]
    return np.array(accuracies), thresholds[best]


def measure_verification(
    embeddings: np.ndarray, same: np.ndarray, far: tuple[float, ...] = FALSE_ACCEPT_RATES
) -> VerificationResult:
    """All measures of a benchmark.

    Args:
        embeddings (`np.ndarray` of shape `(2 * N, D)`): 2 i and 2 i + 1 are pair i; of any length.
        same (`np.ndarray` of shape `(N,)`): booleans, whether a pair is of one person.
        far: false accept rates at which the true accept rate is measured.

    Raises:
        ValueError: the numbers disagree, there are fewer than ten pairs or none of a kind, or an embedding is zero or
            not finite.
    """
    embeddings, same = np.asarray(embeddings, np.float64), np.asarray(same, bool)
    if embeddings.ndim != 2 or len(embeddings) != 2 * len(same):
        raise ValueError(f"{embeddings.shape} embeddings for {len(same)} pairs: two are needed for each.")
    wrong = np.flatnonzero(~has_direction(embeddings))
    if len(wrong):
        raise ValueError(f"{len(wrong)} embeddings are zero or not finite, as that of image {wrong[0]}.")
    embeddings = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    distances = np.square(embeddings[::2] - embeddings[1::2]).sum(axis=1)
    accuracies, thresholds = fold_accuracies(distances, same)
    if any(part.all() or not part.any() for part in np.array_split(same, NUM_FOLDS)):
        warnings.warn("a fold is all genuine or all impostor: order the pairs so that tenths have both.", stacklevel=2)
    sizes = [len(part) for part in np.array_split(same, NUM_FOLDS)]
    cosines = 1 - distances / 2
    genuine, impostor = cosines[same], cosines[~same]
    tar_at_far = {}
    for rate in far:
        if rate * len(impostor) >= 1:
            tar, threshold = true_accept_rate(genuine, impostor, rate)
            tar_at_far[rate] = TrueAcceptRate(tar, *true_accept_interval(genuine, impostor, rate), threshold)
    return VerificationResult(
        fold_accuracies=accuracies,
        threshold=float(np.mean(1 - thresholds / 2)),
        eer=equal_error_rate(genuine, impostor),
        tar_at_far=tar_at_far,
        genuine=genuine,
        impostor=impostor,
        right=(distances < thresholds.repeat(sizes)) == same,
    )


def embed_benchmark(recognizer: Recognizer, benchmark: Benchmark) -> np.ndarray:
    """Features of a face and of its mirror image, added, of all images; each picture is embedded once, in however many
    pairs it is.

    Returns:
        `np.ndarray` of shape `(2 * pairs, D)`.
    """
    numbers: dict[bytes, int] = {}
    number_of = np.array([numbers.setdefault(image, len(numbers)) for image in benchmark.images])
    first_places = np.unique(number_of, return_index=True)[1]
    faces = (benchmark.face(place) for place in first_places)
    return embed_faces(recognizer, faces, len(first_places), benchmark.name)[number_of]


def verify_benchmarks(
    recognizer: Recognizer,
    benchmarks: str | os.PathLike | Sequence[Benchmark],
    done: Callable[[dict[str, VerificationResult]], None] = lambda results: None,
) -> dict[str, VerificationResult]:
    """Measures a recognizer on benchmarks.

    Args:
        recognizer: as `load_recognizer` gives it.
        benchmarks: a folder of benchmarks, or one of them, see `read_benchmarks`; or what that gave.
        done: called with the results so far after each.

    Returns:
        One result for each, by the file's name without suffix.

    Raises:
        ValueError: there are none, or one is damaged. All are read before the first is measured.
    """
    results = {}
    for benchmark in read_benchmarks(benchmarks) if isinstance(benchmarks, str | os.PathLike) else benchmarks:
        results[benchmark.name] = measure_verification(embed_benchmark(recognizer, benchmark), benchmark.same)
        done(results)
    return results


def verification_table(results: dict[str, VerificationResult]) -> str:
    """Results as text, in percent. The last row of several is the mean accuracy, by which methods are compared."""
    heads = ["benchmark", "pairs", "accuracy", "EER", *(f"TAR@FAR {far:g}" for far in FALSE_ACCEPT_RATES)]
    rows = []
    for name, result in results.items():
        rates = [result.tar_at_far.get(far) for far in FALSE_ACCEPT_RATES]
        rows.append(
            [
                name,
                str(len(result.genuine) + len(result.impostor)),
                f"{100 * result.accuracy:.2f} +- {100 * result.accuracy_std:.2f}",
                f"{100 * result.eer:.2f}",
                *("-" if r is None else f"{100 * r.rate:.2f} [{100 * r.low:.2f}, {100 * r.high:.2f}]" for r in rates),
            ]
        )
    if len(results) > 1:
        mean = np.mean([result.accuracy for result in results.values()])
        rows.append(["mean", "", f"{100 * mean:.2f}", *[""] * (len(heads) - 3)])
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def save_verification(results: dict[str, VerificationResult], name: str, output: str | os.PathLike) -> None:
    """Writes `verification.json` and the curves, `roc.png`, of a recognizer `name` into a folder."""
    from matplotlib.figure import Figure  # of the extra `train`; without pyplot it needs no display

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    benchmarks = {benchmark: result.to_dict() for benchmark, result in results.items()}
    write_json(output / "verification.json", {"recognizer": name, "benchmarks": benchmarks})
    figure = Figure()
    axis = figure.subplots()
    for benchmark, result in results.items():
        accepted, right = roc(result.genuine, result.impostor)
        shown = accepted > 0  # a logarithm has no place for the others
        axis.step(accepted[shown], right[shown], where="post", label=benchmark)
    axis.set_xscale("log")
    axis.set_xlabel("false accept rate")
    axis.set_ylabel("true accept rate")
    axis.set_title(name)
    axis.legend()
    axis.grid(alpha=0.3)
    with complete_file(output / "roc.png") as beside:
        figure.savefig(beside, format="png", dpi=150)
