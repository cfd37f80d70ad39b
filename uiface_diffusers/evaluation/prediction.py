"""Which figure of a data set tells how good a recognizer becomes that is trained on it?"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

# fewer sets have no order to speak of
FEWEST = 3


class Prediction(NamedTuple):
    """
    Args:
        figure (`str`): its name.
        correlation (`float`): rank correlation with the accuracy, over the sets that have both.
        sets (`int`): how many these are.
    """

    figure: str
    correlation: float
    sets: int


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks `(N,)`; equal values share the mean of theirs."""
    _, numbers, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[numbers]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation of two lists; not a number if one of them is of equal values.

    Raises:
        ValueError: there are fewer than two values, different numbers of them, or one is not finite.
    """
    values = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if values[0].shape != values[1].shape or values[0].ndim != 1 or len(values[0]) < 2:
        raise ValueError(f"{len(first)} and {len(second)} values: a correlation needs two lists of two or more.")
    if not all(np.isfinite(each).all() for each in values):
        raise ValueError("a value is not finite: it has no rank.")
    ranks = [_ranks(each) - (len(each) + 1) / 2 for each in values]
    norm = np.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1]))
    return float(ranks[0] @ ranks[1] / norm) if norm else float("nan")


def rank_predictors(figures: Mapping[str, Mapping[str, float]], accuracies: Mapping[str, float]) -> list[Prediction]:
    """Figures by how well they predict accuracy, whatever the sign: the surest first.

    Args:
        figures: figure -> set -> value.
        accuracies: set -> accuracy.

    Returns:
        Those that three sets or more have, with different values.
    """
    found = []
    for figure, values in figures.items():
        sets = [name for name in values if name in accuracies and np.isfinite([values[name], accuracies[name]]).all()]
        if len(sets) >= FEWEST:
            correlation = rank_correlation([values[name] for name in sets], [accuracies[name] for name in sets])
            found.append(Prediction(figure, correlation, len(sets)))
    return sorted((each for each in found if np.isfinite(each.correlation)), key=lambda each: -abs(each.correlation))
