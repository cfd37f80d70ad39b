import numpy as np
import pytest

from uiface_diffusers.evaluation import equal_error_rate


def test_equal_error_rate_by_brute_force():
    """Every threshold between two scores tried: the smallest maximum of both errors is an upper bound, and the largest
    minimum a lower one."""
    generator = np.random.default_rng(0)
    for shift, number in ((0.0, 50), (1.0, 200), (3.0, 400)):
        genuine, impostor = generator.normal(shift, 1, number), generator.normal(0, 1, 3 * number)
        scores = np.sort(np.concatenate([genuine, impostor]))
        thresholds = np.concatenate([scores[:1] - 1, (scores[1:] + scores[:-1]) / 2, scores[-1:] + 1])
        errors = np.array([[np.mean(genuine < t), np.mean(impostor >= t)] for t in thresholds])
        rate = equal_error_rate(genuine, impostor)
        assert errors.min(axis=1).max() - 1e-9 <= rate <= errors.max(axis=1).min() + 1e-9
        assert abs(errors.max(axis=1).min() - errors.min(axis=1).max()) < 2 / number


def test_equal_error_rate_of_known_cases():
    assert equal_error_rate(np.array([0.8, 0.9]), np.array([0.1, 0.2])) == 0
    assert equal_error_rate(np.array([0.1, 0.2]), np.array([0.8, 0.9])) == 1
    # one of four on each side
    assert equal_error_rate(np.array([0.3, 0.6, 0.7, 0.8]), np.array([0.1, 0.2, 0.25, 0.5])) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="0 genuine"):
        equal_error_rate(np.array([]), np.array([0.1]))
