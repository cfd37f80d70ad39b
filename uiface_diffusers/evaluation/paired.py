"""Recognizers compared on the same pairs: 95 % intervals of their differences in accuracy.

Pairs share people, so people are resampled, not pairs (Snijders & Borgatti 1999): a genuine pair counts as often as
its person is drawn, an impostor pair as often as its first person times as often as its second. All recognizers see
the same draws, so that what is common to them cancels in a difference. Where people are in few pairs each, the
intervals are wider than need be (Owen 2007).
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from ..data.pairs import Pair

RESAMPLES = 2000


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def pair_people(pairs: Sequence[Pair]) -> np.ndarray:
    """Who is on the photographs of a list of pairs.

    A photograph's folder is its person, unless an impostor pair lies in one folder or there are no folders: then only
    the genuine pairs say who is one person.

    Returns:
        `np.ndarray` of shape `(N, 2)`: numbers of people from 0 on; equal in genuine pairs.

    Raises:
        ValueError: genuine pairs make the two photographs of an impostor pair one person.
    """
    folders = {photo: str(PurePosixPath(photo).parent) for pair in pairs for photo in pair[:2]}
    named = "." not in folders.values() and all(pair.same or folders[pair[0]] != folders[pair[1]] for pair in pairs)
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    names = [tuple(folders[photo] if named else photo for photo in pair[:2]) for pair in pairs]
    for (first, second), pair in zip(names, pairs, strict=True):
        if pair.same:
            parent[root(first)] = root(second)
    roots = [[root(name) for name in two] for two in names]
    for (first, second), pair in zip(roots, pairs, strict=True):
        if first == second and not pair.same:
            raise ValueError(f"{pair.first} and {pair.second} are one person by other pairs, and two in this one.")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(name for two in roots for name in two))}
    return np.array([[numbers[name] for name in two] for two in roots])


def pair_weights(people: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """How often each pair counts in a resample.

    Args:
        people (`np.ndarray` of shape `(N, 2)`): of `pair_people`.
        drawn (`np.ndarray` of shape `(P,)`): who was drawn.

    Returns:
        `np.ndarray` of shape `(N,)`.
    """
    times = np.bincount(drawn, minlength=people.max() + 1)[people]
    return np.where(people[:, 0] == people[:, 1], times[:, 0], times.prod(axis=1))


@dataclass(frozen=True)
class PairedAccuracies:
    """Accuracies of A recognizers, or groups of recognizers that differ in their seeds, on T tests; the tests' mean is
    the last.

    Args:
        measured (`np.ndarray` of shape `(A, T + 1)`).
        resampled (`np.ndarray` of shape `(R, A, T + 1)`).
    """

    measured: np.ndarray
    resampled: np.ndarray

    def difference(self, first: int, second: int) -> list[Interval]:
        """`first` minus `second`: T + 1 intervals."""
        values = self.measured[first] - self.measured[second]
        bounds = np.quantile(self.resampled[:, first] - self.resampled[:, second], [0.025, 0.975], axis=0)
        return [Interval(*map(float, each)) for each in zip(values, *bounds, strict=True)]


def _weighted(right: np.ndarray, people: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Accuracies `(A, S)` of `(A, S, N)`: genuine and impostor pairs keep their shares of the test."""
    total = np.zeros(right.shape[:2])
    genuine = people[:, 0] == people[:, 1]
    for kind in (genuine, ~genuine):
        chosen = weights * kind
        # of few people, all pairs of a kind can be missing from a resample
        chosen = chosen if chosen.any() else kind
        total += kind.mean() * (right @ chosen) / chosen.sum()
    return total


def resample_accuracies(
    right: Sequence[np.ndarray], people: Sequence[np.ndarray], num_resamples: int = RESAMPLES, seed: int = 0
) -> PairedAccuracies:
    """Accuracies and their resamples.

    In a resample, as many people as there are in a test are drawn with replacement, of each test on its own, and the
    accuracy is the mean over all seeds. To it is added how far the mean of some seeds, drawn with replacement, is from
    that of all on the test as it is: one seed fewer than there are is drawn (Rao & Wu 1988: as many would make the
    variance too small, of three by a third), the same ones for all A and all tests. With one seed, what another would
    give is not in the intervals.

    Args:
        right: of each test, `(A, S, N)` booleans: whether a recognizer with a seed is right about a pair. Numbers of A
            and S are the same in all tests.
        people: of each test, `(N, 2)`, of `pair_people`.
        num_resamples (`int`, defaults to 2000).
        seed (`int`, defaults to 0): of the draws.

    Raises:
        ValueError: numbers disagree, or a test has pairs of one kind only.
    """
    if len(right) != len(people) or not right or len({each.shape[:2] for each in right}) > 1:
        raise ValueError("every test needs its people, and the answers of the same recognizers and seeds.")
    for answers, who in zip(right, people, strict=True):
        if answers.ndim != 3 or answers.shape[2] != len(who):
            raise ValueError(f"answers are of shape {answers.shape}, for {len(who)} pairs.")
        if len(set((who[:, 0] == who[:, 1]).tolist())) < 2:
            raise ValueError("a test has genuine or impostor pairs only.")
    right = [np.asarray(answers, np.float64) for answers in right]
    generator, seeds = np.random.default_rng(seed), right[0].shape[1]

    def with_mean(of_tests: list[np.ndarray]) -> np.ndarray:
        return np.stack([*of_tests, np.mean(of_tests, axis=0)], axis=1)

    of_seeds = [answers.mean(axis=2) for answers in right]
    deviations = [each - each.mean(axis=1, keepdims=True) for each in of_seeds]
    resampled = []
    for _ in range(num_resamples):
        drawn_seeds = generator.integers(seeds, size=max(1, seeds - 1))
        accuracies = []
        for answers, who, deviation in zip(right, people, deviations, strict=True):
            number = who.max() + 1
            weights = pair_weights(who, generator.integers(number, size=number))
            of_people = _weighted(answers, who, weights).mean(axis=1)
            accuracies.append(of_people + deviation[:, drawn_seeds].mean(axis=1))
        resampled.append(with_mean(accuracies))
    return PairedAccuracies(with_mean([each.mean(axis=1) for each in of_seeds]), np.stack(resampled))


def pack_answers(right: np.ndarray) -> str:
    """Booleans `(N,)` as text for JSON."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def unpack_answers(text: str, number: int) -> np.ndarray:
    """What `pack_answers` packed: booleans `(number,)`.

    Raises:
        ValueError: it is of another number of pairs.
    """
    bits = np.frombuffer(base64.b64decode(text), np.uint8)
    if len(bits) != -(-number // 8):
        raise ValueError(f"answers to {8 * len(bits)} pairs or some fewer are kept, these are {number}.")
    return np.unpackbits(bits, count=number).astype(bool)
