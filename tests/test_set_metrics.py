"""Each measure against a slow computation that follows its definition."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from slow_references import slow_share
from torch import nn

from uiface_diffusers.evaluation import (
    TorchvisionFeatures,
    class_precision_recall,
    class_uniqueness,
    improved_precision_recall,
    intra_class_consistency,
    load_lpips,
    measure_separability,
)
from uiface_diffusers.evaluation.class_structure import class_centers
from uiface_diffusers.evaluation.diversity import identity_pairs, mean_lpips
from uiface_diffusers.evaluation.features import LpipsFeatures
from uiface_diffusers.evaluation.separability import (
    false_non_match_rate,
    genuine_pairs,
    impostor_pairs,
    pair_cosines,
)


def labeled_embeddings(identities: int = 30, spread: float = 0.6) -> tuple[torch.Tensor, torch.Tensor]:
    """2 to 7 embeddings of each identity, shuffled."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(2, 8, (identities,), generator=generator)
    labels = torch.arange(identities).repeat_interleave(counts)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centers = torch.randn(identities, 12, generator=generator)
    noise = torch.randn(len(labels), 12, generator=generator)
    return F.normalize(centers[labels] + spread * noise), labels


def as_set(pairs: np.ndarray) -> set[tuple[int, int]]:
    return {tuple(sorted(pair)) for pair in pairs.tolist()}


@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 1, 0, 3], [0, 0, 0], [0, 1, 2], [5, 5, 1]])
def test_all_pairs_once(labels):
    labels = np.array(labels)
    every = set(itertools.combinations(range(len(labels)), 2))
    expected = {(i, j) for i, j in every if labels[i] == labels[j]}
    genuine, impostor = genuine_pairs(labels), impostor_pairs(labels)
    assert (as_set(genuine), as_set(impostor)) == (expected, every - expected)
    assert len(genuine) + len(impostor) == len(every)


def test_pairs_are_drawn_uniformly_and_by_the_seed():
    labels = np.repeat(np.arange(5), [2, 3, 4, 5, 6])
    every = [as_set(draw(labels)) for draw in (genuine_pairs, impostor_pairs)]
    counts = [dict.fromkeys(pairs, 0) for pairs in every]
    for seed in range(600):
        for draw, count in zip((genuine_pairs, impostor_pairs), counts, strict=True):
            drawn = as_set(draw(labels, 10, seed))
            assert len(drawn) == 10
            for pair in drawn:
                count[pair] += 1
    for count in counts:
        expected = 600 * 10 / len(count)
        deviation = math.sqrt(expected * (1 - 10 / len(count)))
        assert max(abs(value - expected) for value in count.values()) < 4 * deviation
    assert np.array_equal(genuine_pairs(labels, 7, 3), genuine_pairs(labels, 7, 3))
    # of 20,000,000,000 pairs, without a list of all
    labels = np.arange(200_000) // 20
    pairs = impostor_pairs(labels, 1000, 0)
    assert len(as_set(pairs)) == 1000 and (labels[pairs[:, 0]] != labels[pairs[:, 1]]).all()
    pairs = genuine_pairs(labels, 1000, 0)
    assert len(as_set(pairs)) == 1000 and (labels[pairs[:, 0]] == labels[pairs[:, 1]]).all()


def lowest_fnmr(genuine: list[float], impostor: list[float], rate: float) -> float:
    """Over every threshold that makes a difference."""
    genuine, impostor = np.array(genuine), np.array(impostor)
    thresholds = np.unique([*genuine, *impostor, math.inf])
    return min((genuine < each).mean() for each in thresholds if (impostor >= each).mean() <= rate)


@pytest.mark.parametrize("decimals", [1, 6])  # 1: many ties
def test_separability(decimals):
    embeddings, labels = labeled_embeddings(12)
    pairs = itertools.combinations(range(len(labels)), 2)
    vectors = embeddings.numpy()
    cosines = {(i, j): float(np.dot(vectors[i], vectors[j])) for i, j in pairs}
    by_kind = [genuine_pairs(labels.numpy()), impostor_pairs(labels.numpy())]
    found = [pair_cosines(embeddings, pairs) for pairs in by_kind]
    for pairs, values in zip(by_kind, found, strict=True):
        assert values == pytest.approx([cosines[tuple(sorted(pair))] for pair in pairs.tolist()], abs=1e-6)
    genuine, impostor = (np.round(values.astype(float), decimals).tolist() for values in found)
    measured = measure_separability(np.array(genuine), np.array(impostor))
    assert measured.fmr100 == pytest.approx(lowest_fnmr(genuine, impostor, 0.01), abs=1e-6)
    assert measured.fmr1000 == pytest.approx(lowest_fnmr(genuine, impostor, 0.001), abs=1e-6)
    for rate in (0, 0.07, 0.3, 0.99):
        expected = lowest_fnmr(genuine, impostor, rate)
        assert false_non_match_rate(np.array(genuine), np.array(impostor), rate) == pytest.approx(expected, abs=1e-6)
    means = statistics.fmean(genuine), statistics.fmean(impostor)
    variances = statistics.pvariance(genuine), statistics.pvariance(impostor)
    assert measured.fdr == pytest.approx((means[0] - means[1]) ** 2 / sum(variances), abs=1e-6)
    assert (measured.genuine_mean, measured.impostor_mean) == pytest.approx(means, abs=1e-6)
    spreads = measured.genuine_std**2, measured.impostor_std**2
    assert spreads == pytest.approx(variances, abs=1e-6)


def test_a_collapsed_set_and_a_set_without_pairs():
    assert measure_separability(np.ones(3), np.zeros(4)).fdr == math.inf
    with pytest.raises(ValueError, match="0 genuine and 2 impostor pairs"):
        false_non_match_rate(np.empty(0), np.ones(2), 0.1)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.6])
def test_uniqueness_and_consistency(threshold):
    embeddings, labels = labeled_embeddings(spread=1.0)
    vectors = embeddings.numpy().astype(float)
    members = [[i for i, label in enumerate(labels.tolist()) if label == identity] for identity in range(30)]
    means = [np.mean(vectors[own], axis=0) for own in members]
    centers = [mean / np.linalg.norm(mean) for mean in means]
    found = class_centers(embeddings, labels)
    assert np.abs(found.numpy() - np.array(centers)).max() < 1e-6
    kept = []
    for center in centers:
        if all(np.dot(center, other) < threshold for other in kept):
            kept.append(center)
    assert 1 < len(kept) < 30
    assert class_uniqueness(found, threshold) == pytest.approx(len(kept) / 30, abs=1e-6)
    cosines = {i: np.dot(vectors[i], centers[identity]) for identity, own in enumerate(members) for i in own}
    shares = [sum(cosines[i] > threshold for i in own) / len(own) for own in members]
    share, to_center = intra_class_consistency(embeddings, labels, threshold)
    assert share == pytest.approx(np.mean(shares), abs=1e-6)
    assert to_center.numpy() == pytest.approx([cosines[i] for i in range(len(labels))], abs=1e-6)
    for own in members[:-1]:
        for i in own:
            others = np.sum([vectors[j] for j in own if j != i], axis=0)
            cosines[i] = np.dot(vectors[i], others / np.linalg.norm(others))
    # of the last identity a single image, which has no others
    kept = [i for i in range(len(labels)) if i not in members[-1][1:]]
    share, to_others = intra_class_consistency(embeddings[kept], labels[kept], threshold, leave_one_out=True)
    shares = [sum(cosines[i] > threshold for i in own) / len(own) for own in members[:-1]]
    assert share == pytest.approx(np.mean(shares), abs=1e-6)
    expected = [cosines[i] for i in kept if i != members[-1][0]]
    assert to_others.numpy() == pytest.approx(expected, abs=1e-6)


def test_strangers_pass_for_one_person_when_each_is_part_of_the_mean():
    embeddings = F.normalize(torch.randn(200, 512, generator=torch.Generator().manual_seed(0)))
    labels = torch.arange(200) // 5
    assert intra_class_consistency(embeddings, labels)[0] == 1.0
    assert intra_class_consistency(embeddings, labels, leave_one_out=True)[0] == 0.0


def feature_sets(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "continuous":
        return (
            torch.randn(60, 6, generator=generator),
            0.7 * torch.randn(45, 6, generator=generator) + 5 + torch.tensor([-4.0, -5, -5, -5, -5, -5]),
        )
    # whole numbers: many equal distances and equal images; radii of 0
    real = torch.randint(0, 5, (60, 3), generator=generator).float()
    synthetic = torch.randint(2, 7, (45, 3), generator=generator).float()
    synthetic[:5] = synthetic[5]
    synthetic[6] = real[0]
    return real, synthetic


@pytest.mark.parametrize("kind", ["continuous", "ties"])
@pytest.mark.parametrize("k", [1, 3, 44])
def test_precision_and_recall(monkeypatch, kind, k):
    """In blocks that do not divide the sets."""
    monkeypatch.setattr("uiface_diffusers.evaluation.precision_recall.ROWS", 7)
    monkeypatch.setattr("uiface_diffusers.evaluation.precision_recall.COLUMNS", 13)
    real, synthetic = feature_sets(kind)
    precision, recall = improved_precision_recall(real, synthetic, k)
    assert precision == pytest.approx(slow_share(synthetic.numpy(), real.numpy(), k), abs=1e-6)
    assert recall == pytest.approx(slow_share(real.numpy(), synthetic.numpy(), k), abs=1e-6)
    assert 0 < recall < 1 or k == 44


def test_equal_images_far_from_zero_lie_within_each_other():
    """Radius and distance are 0 although the product of large features is rounded."""
    same = (1000 + torch.rand(1, 512, generator=torch.Generator().manual_seed(0))).expand(5, -1)
    assert improved_precision_recall(same, same) == (1.0, 1.0)


def test_too_few_images_are_named():
    with pytest.raises(ValueError, match="3 images have no 3-th nearest"):
        improved_precision_recall(torch.eye(3), torch.eye(5, 3))


def test_precision_and_recall_within_identities():
    generator = torch.Generator().manual_seed(2)
    real_names = ["a"] * 6 + ["b"] * 5 + ["few"] * 3 + ["only real"] * 9
    names = ["b"] * 7 + ["a"] * 4 + ["few"] * 8 + ["only synthetic"] * 5
    real, synthetic = (torch.randn(len(each), 4, generator=generator) for each in (real_names, names))
    figures = class_precision_recall(real, real_names, synthetic, names, k=3)
    expected = []
    for name in "ab":
        ours = synthetic[[i for i, each in enumerate(names) if each == name]].numpy()
        theirs = real[[i for i, each in enumerate(real_names) if each == name]].numpy()
        expected.append((slow_share(ours, theirs, 3), slow_share(theirs, ours, 3)))
    assert (figures.precision, figures.recall) == pytest.approx(np.mean(expected, axis=0), abs=1e-6)
    assert figures.identities == 2
    with pytest.raises(ValueError, match="no identity has more than 3"):
        class_precision_recall(real[:6], ["a"] * 6, synthetic[:7], ["b"] * 7)


@pytest.fixture(scope="module")
def perceptual(backbone):
    return load_lpips("alex", backbone)


def test_lpips_of_pairs(perceptual):
    images = torch.rand(9, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pairs = identity_pairs("anna", 9, None)
    assert as_set(pairs) == set(itertools.combinations(range(9), 2))  # more than one batch
    one_by_one = [float(perceptual(images[i : i + 1], images[j : j + 1])) for i, j in pairs.tolist()]
    assert mean_lpips(images, pairs, perceptual) == pytest.approx(statistics.fmean(one_by_one), abs=1e-6)
    drawn = identity_pairs("anna", 9, 5, seed=1)
    assert len(as_set(drawn)) == 5
    assert np.array_equal(drawn, identity_pairs("anna", 9, 5, seed=1))
    assert not np.array_equal(drawn, identity_pairs("berta", 9, 5, seed=1))


def test_lpips_features(perceptual):
    """Convolutions by hand, up to the fifth."""
    images = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    weights = {name.split(".", 1)[1]: value for name, value in perceptual.net.state_dict().items()}
    mean, deviation = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (images - mean[:, None, None]) / deviation[:, None, None]
    for layer, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
        x = F.max_pool2d(x, 3, 2) if layer in (3, 6) else x
        x = F.relu(F.conv2d(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"], stride, padding))
    network = LpipsFeatures(perceptual)
    assert torch.allclose(network(images), x.mean(dim=(2, 3)), atol=1e-6) and network(images).shape == (2, 256)
    assert network.name.startswith("LPIPS alex")


class Stand(nn.Module):
    """The parts of torchvision's VGG16 and Inception that matter here, small."""

    def __init__(self, weights=None, init_weights=True, transform_input=None):
        super().__init__()
        assert weights is None and not init_weights
        parts = [nn.Linear(12, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 4)]
        self.classifier, self.fc = nn.Sequential(*parts), nn.Linear(12, 4)
        self.of_inception = transform_input is not None

    def forward(self, pixels):
        self.size = pixels.shape[-2:]
        pooled = F.adaptive_avg_pool2d(pixels, 2).flatten(1)
        return self.fc(pooled) if self.of_inception else self.classifier(pooled)


def test_torchvision_features(monkeypatch, tmp_path):
    """Which layer, of which size, and how pixels are scaled; a file of another network."""
    from torchvision import models

    for name in ("vgg16", "inception_v3"):
        monkeypatch.setattr(models, name, Stand)
    torch.manual_seed(0)
    state = Stand(init_weights=False).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    images = torch.rand(3, 3, 112, 112) * 2 - 1
    vgg = TorchvisionFeatures("vgg16", tmp_path / "weights.safetensors")
    scaled = ((images + 1) / 2 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    pooled = F.adaptive_avg_pool2d(F.interpolate(scaled, (224, 224), mode="bilinear"), 2).flatten(1)
    hidden = F.relu(F.linear(pooled, state["classifier.0.weight"], state["classifier.0.bias"]))
    expected = F.relu(F.linear(hidden, state["classifier.3.weight"], state["classifier.3.bias"]))
    assert torch.allclose(vgg(images), expected, atol=1e-5) and vgg.model.size == (224, 224)
    inception = TorchvisionFeatures("inception_v3", tmp_path / "weights.safetensors")
    pooled = F.adaptive_avg_pool2d(F.interpolate(images, (299, 299), mode="bilinear"), 2).flatten(1)
    assert torch.allclose(inception(images), pooled, atol=1e-5) and inception.model.size == (299, 299)
    assert vgg.name.startswith("torchvision vgg16") and vgg.name != inception.name
    save_file({"fc.bias": state["fc.bias"]}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="half.safetensors does not hold torchvision's vgg16"):
        TorchvisionFeatures("vgg16", tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="'resnet50'"):
        TorchvisionFeatures("resnet50")
