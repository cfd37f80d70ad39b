import itertools

import pytest
import torch
import torch.nn.functional as F

from uiface_diffusers.evaluation import identity_consistency


def test_equals_the_loops():
    torch.manual_seed(0)
    references = F.normalize(torch.randn(5, 8), dim=-1)
    generated = F.normalize(references[:, None] + 0.5 * torch.randn(5, 3, 8), dim=-1)
    own, other = [], []
    for n, m, k in itertools.product(range(5), range(3), range(5)):
        (own if n == k else other).append(float(generated[n, m] @ references[k]))
    result = identity_consistency(generated, references)
    assert abs(result["own"] - sum(own) / len(own)) < 1e-6
    assert abs(result["other"] - sum(other) / len(other)) < 1e-6
    assert abs(result["difference"] - (result["own"] - result["other"])) < 1e-6
    assert 0 < result["difference_low"] < result["difference"] < result["difference_high"]


def test_interval_of_unrelated_faces_holds_zero():
    torch.manual_seed(0)
    references = F.normalize(torch.randn(40, 64), dim=-1)
    generated = F.normalize(torch.randn(40, 4, 64), dim=-1)
    result = identity_consistency(generated, references)
    assert result["difference_low"] < 0 < result["difference_high"]


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\(4, 2, 8\) and \(3, 8\)"):
        identity_consistency(torch.zeros(4, 2, 8), torch.zeros(3, 8))
