"""95 % intervals of measured rates."""

import numpy as np

# deviations of a normal distribution that 95 % lie within
DEVIATIONS = 1.96


def wilson_interval(rate: float, number: int) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) of a share `rate` that was measured on `number` independent trials."""
    center = (rate + DEVIATIONS**2 / (2 * number)) / (1 + DEVIATIONS**2 / number)
    half = np.sqrt(rate * (1 - rate) / number + DEVIATIONS**2 / (4 * number**2))
    half *= DEVIATIONS / (1 + DEVIATIONS**2 / number)
    return max(0.0, float(center - half)), min(1.0, float(center + half))


def accept_interval(
    genuine: np.ndarray, impostor: np.ndarray, far: float, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % bootstrap interval of `true_accept_rate`, never narrower than Wilson's at the measured threshold: the
    interval of `true_accept_interval`, for millions of scores.

    Nothing is resampled. The threshold of a resample is the score at an order statistic of uniform numbers, which is
    Beta distributed. The number of its genuine scores above the threshold is binomial.

    Args:
        genuine (`np.ndarray` of shape `(N,)`): scores of one person; `-inf` is never accepted.
        impostor (`np.ndarray` of shape `(M,)`): of two.
        far (`float`): false accept rate, below 1.
    """
    generator = np.random.default_rng(seed)
    genuine, impostor, number = np.sort(genuine), np.sort(impostor)[::-1], len(impostor)
    accepted = int(far * number + 1e-9)
    positions = (generator.beta(accepted + 1, number - accepted, num_resamples) * number).astype(int)
    thresholds = impostor[np.append(np.minimum(positions, number - 1), accepted)]
    *shares, measured = 1 - np.searchsorted(genuine, thresholds, side="right") / len(genuine)
    low, high = np.quantile(generator.binomial(len(genuine), shares) / len(genuine), [0.025, 0.975])
    bounds = wilson_interval(measured, len(genuine))
    return min(float(low), bounds[0]), max(float(high), bounds[1])
