"""Verification: are two faces of one person?"""

import numpy as np


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
    from sklearn.metrics import roc_curve  # of the extra `train`

    if not len(genuine) or not len(impostor):
        raise ValueError(f"{len(genuine)} genuine and {len(impostor)} impostor pairs: an error rate needs both.")
    labels = np.concatenate([np.ones(len(genuine)), np.zeros(len(impostor))])
    accepted, right, _ = roc_curve(labels, np.concatenate([genuine, impostor]), drop_intermediate=False)
    rejected = 1 - right
    # rejected falls, accepted rises along the curve
    after = int(np.argmax(accepted >= rejected))
    before = max(after - 1, 0)
    gap_before, gap_after = rejected[before] - accepted[before], rejected[after] - accepted[after]
    share = 0.0 if gap_before == gap_after else gap_before / (gap_before - gap_after)
    return float(accepted[before] + share * (accepted[after] - accepted[before]))
