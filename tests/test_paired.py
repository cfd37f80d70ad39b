"""Intervals of differences between recognizers, and which figure predicts accuracy."""

import numpy as np
import pytest

from uiface_diffusers.data.pairs import Pair
from uiface_diffusers.evaluation.paired import (
    pack_answers,
    pair_people,
    pair_weights,
    resample_accuracies,
    unpack_answers,
)
from uiface_diffusers.evaluation.prediction import rank_correlation, rank_predictors


def random_pairs(generator: np.random.Generator, people: int, number: int) -> np.ndarray:
    """Half genuine, half impostor pairs."""
    first = generator.integers(people, size=number)
    other = (first + generator.integers(1, people, size=number)) % people
    return np.stack([first, np.where(np.arange(number) % 2 == 0, first, other)], axis=1)


def test_a_resample_counts_pairs_of_copies():
    """As by writing out all pairs between copies of the drawn people."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        pairs, drawn = random_pairs(generator, 6, 30), generator.integers(6, size=6)
        for (a, b), weight in zip(pairs, pair_weights(pairs, drawn), strict=True):
            copies = [(i, j) for i, p in enumerate(drawn) for j, q in enumerate(drawn) if (p, q) == (a, b)]
            assert weight == len([(i, j) for i, j in copies if a != b or i == j])


def test_resamples_are_those_of_loops():
    generator = np.random.default_rng(1)
    people = [random_pairs(generator, 9, 40), random_pairs(generator, 5, 24)]
    right = [generator.random((3, 4, len(each))) < 0.7 for each in people]
    found = resample_accuracies(right, people, num_resamples=15, seed=3)

    draws = np.random.default_rng(3)
    for resample in range(15):
        seeds = draws.integers(4, size=3)
        drawn = [draws.integers(each.max() + 1, size=each.max() + 1) for each in people]
        for arm in range(3):
            accuracies = []
            for answers, pairs, of_test in zip(right, people, drawn, strict=True):
                accuracy = 0.0
                for kind in (True, False):
                    hits = total = count = 0.0
                    for n, (a, b) in enumerate(pairs):
                        if (a == b) == kind:
                            times = list(of_test).count(a) * (1 if kind else list(of_test).count(b))
                            hits += times * np.mean([answers[arm][seed][n] for seed in range(4)])
                            total, count = total + times, count + 1
                    accuracy += count / len(pairs) * hits / total
                means = [answers[arm][seed].mean() for seed in range(4)]
                accuracies.append(accuracy + np.mean([means[seed] for seed in seeds]) - np.mean(means))
            expected = [*accuracies, np.mean(accuracies)]
            assert found.resampled[resample, arm] == pytest.approx(expected, abs=1e-12)
    measured = [each[1].mean() for each in right]
    assert found.measured[1] == pytest.approx([*measured, np.mean(measured)])
    value, low, high = found.difference(2, 0)[-1]
    differences = found.resampled[:, 2, -1] - found.resampled[:, 0, -1]
    assert (low, high) == pytest.approx(np.quantile(differences, [0.025, 0.975]))
    assert value == pytest.approx(found.measured[2, -1] - found.measured[0, -1])


def test_equal_recognizers_differ_by_nothing():
    generator = np.random.default_rng(2)
    people = [random_pairs(generator, 20, 100), random_pairs(generator, 8, 60)]
    right = [np.repeat(generator.random((1, 3, len(each))) < 0.8, 2, axis=0) for each in people]
    for interval in resample_accuracies(right, people, num_resamples=100).difference(0, 1):
        assert interval == pytest.approx((0, 0, 0), abs=1e-12)


def test_intervals_cover_a_known_difference():
    """Five points, where people are easy or hard for all and seeds are good or bad: the interval covers them in
    nearly all worlds, and is not so wide that it says nothing."""
    covered, sure = 0, 0
    for world in range(30):
        generator = np.random.default_rng([4, world])
        people = random_pairs(generator, 60, 1200)
        ease = generator.normal(0, 0.08, 60)[people].mean(axis=1)
        seeds = generator.normal(0, 0.005, (2, 3))
        chance = np.array([0.75, 0.70])[:, None, None] + seeds[..., None] + ease
        # recognizers mostly fail at the same pairs
        level = 0.7 * generator.random(len(people)) + 0.3 * generator.random((2, 3, len(people)))
        right = level < np.clip(chance, 0, 1)
        truth = np.mean([(level_of(chance[0]) - level_of(chance[1]))])
        value, low, high = resample_accuracies([right], [people], num_resamples=200).difference(0, 1)[0]
        covered += low <= truth <= high
        sure += low > 0
    assert covered >= 28 and sure >= 25


def level_of(chance: np.ndarray) -> np.ndarray:
    """Probability that 0.7 u + 0.3 v of two uniform numbers is below `chance`, from 0.3 to 0.7 linear."""
    x = np.clip(chance, 0, 1)
    middle = (x - 0.15) / 0.7
    low, high = x**2 / 0.42, 1 - (1 - x) ** 2 / 0.42
    return np.where(x < 0.3, low, np.where(x > 0.7, high, middle))


def test_wrong_shapes_are_named():
    people = np.array([[0, 0], [0, 1]])
    with pytest.raises(ValueError, match="for 2 pairs"):
        resample_accuracies([np.ones((1, 1, 3))], [people])
    with pytest.raises(ValueError, match="the same recognizers and seeds"):
        resample_accuracies([np.ones((1, 1, 2)), np.ones((1, 2, 2))], [people, people])
    with pytest.raises(ValueError, match="genuine or impostor pairs only"):
        resample_accuracies([np.ones((1, 1, 2))], [np.array([[0, 1], [1, 2]])])


def test_people_of_pairs():
    named = [Pair("a/1", "a/2", True), Pair("a/3", "b/1", False), Pair("c/1", "b/2", False)]
    assert pair_people(named).tolist() == [[0, 0], [0, 1], [2, 1]]
    # of photographs in one folder, or in none, only genuine pairs say who is one person
    for folder in ("", "all/"):
        flat = [("1", "2", True), ("3", "4", False), ("2", "3", True), ("5", "1", False)]
        pairs = [Pair(folder + first, folder + second, same) for first, second, same in flat]
        assert pair_people(pairs).tolist() == [[0, 0], [0, 1], [0, 0], [2, 0]]
    with pytest.raises(ValueError, match="1 and 3 are one person by other pairs, and two in this one"):
        pair_people([Pair("1", "2", True), Pair("2", "3", True), Pair("1", "3", False)])


def test_answers_are_kept_as_text():
    answers = np.random.default_rng(5).random(1003) < 0.5
    assert unpack_answers(pack_answers(answers), 1003).tolist() == answers.tolist()
    with pytest.raises(ValueError, match="these are 900"):
        unpack_answers(pack_answers(answers), 900)


def test_rank_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats", reason="needs the extra `train`")
    generator = np.random.default_rng(6)
    for size in (2, 5, 12, 50):
        first, second = generator.normal(size=size), generator.integers(0, 4, size) + generator.normal(size=size)
        tied = np.append(generator.integers(0, 3, size - 1), 9)
        for one, other in ((first, second), (first, tied), (tied, tied[::-1])):
            assert rank_correlation(one, other) == pytest.approx(stats.spearmanr(one, other).statistic, abs=1e-12)
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    for wrong in (([1], [1]), ([1, 2], [1, 2, 3]), ([1, np.nan], [1, 2])):
        with pytest.raises(ValueError):
            rank_correlation(*wrong)


def test_predictors_are_sorted_by_how_sure_they_are():
    accuracies = {"a": 0.7, "b": 0.8, "c": 0.9, "d": 0.95}
    figures = {
        "constant": dict.fromkeys("abcd", 1.0),
        "some": {"a": 1.0, "b": 3.0, "c": 2.0, "elsewhere": 5.0},
        "falls": {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0},
        "two sets": {"a": 1.0, "b": 2.0},
        "two of three": {"a": 1.0, "b": 2.0, "c": float("nan")},
    }
    found = rank_predictors(figures, accuracies)
    assert [(each.figure, each.sets) for each in found] == [("falls", 4), ("some", 3)]
    assert [each.correlation for each in found] == pytest.approx([-1, 0.5])
