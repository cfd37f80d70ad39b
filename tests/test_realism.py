"""KID and the classifier two-sample test: against slow computations and known cases, and in `uiface evaluate`."""

import itertools
import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import ALEXNET, write_toy_pack
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.preprocessing import StandardScaler
from toy_sets import figures, write_set

from uiface_diffusers import cli
from uiface_diffusers.evaluation import (
    LpipsGridFeatures,
    classifier_test,
    compare_reports,
    evaluate_dataset,
    kernel_distance,
    load_lpips,
    load_report,
    measure_realism,
)
from uiface_diffusers.evaluation.face_set import FaceSet, face_pixels, open_faces
from uiface_diffusers.evaluation.realism import choose_spread, kernel_features, real_halves
from uiface_diffusers.faces import FaceEncoder


def drawn(number: int, seed: int, dimensions: int = 16, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(number, dimensions, generator=torch.Generator().manual_seed(seed)) + shift


def test_kid_pair_by_pair():
    real, generated = drawn(9, 0), drawn(7, 1, shift=0.3)

    def mean(pairs) -> float:
        return np.mean([(float(x @ y) / 16 + 1) ** 3 for x, y in pairs])

    within = [mean(itertools.permutations(each.double(), 2)) for each in (real, generated)]
    expected = sum(within) - 2 * mean(itertools.product(real.double(), generated.double()))
    assert kernel_distance(real, generated)[0] == pytest.approx(expected, rel=1e-9)


def test_kid_is_that_of_torchmetrics():
    """Its `poly_mmd`, written down with scikit-learn's kernel: degree 3, gamma 1 / D, coef 1, unbiased."""
    real, generated = drawn(40, 0).double().numpy(), drawn(40, 1, shift=0.5).double().numpy()
    options = {"degree": 3, "gamma": None, "coef0": 1}
    xx, yy = (polynomial_kernel(each, **options) for each in (real, generated))
    value = (xx.sum() - np.diag(xx).sum() + yy.sum() - np.diag(yy).sum()) / (40 * 39)
    value -= 2 * polynomial_kernel(real, generated, **options).sum() / 40**2
    found, _ = kernel_distance(torch.from_numpy(real), torch.from_numpy(generated))
    assert found == pytest.approx(value, rel=1e-9)
    assert found > 0.1


def test_kid_is_unbiased_and_knows_its_spread():
    """Of one distribution the mean over many draws is 0; the deviation over subsets is about that over draws."""
    found = [kernel_distance(drawn(60, 2 * n), drawn(60, 2 * n + 1), num_subsets=30) for n in range(200)]
    values, spreads = np.array(found).T
    assert abs(values.mean()) < 3 * values.std() / len(values) ** 0.5
    assert values.min() < 0 < values.max()
    shifted = np.array([kernel_distance(drawn(60, 2 * n), drawn(60, 2 * n + 1, shift=0.5)) for n in range(40)])
    assert shifted[:, 0].min() > 0
    assert shifted[:, 1].mean() == pytest.approx(shifted[:, 0].std(), rel=0.3)


def test_kernel_features_have_cosines():
    features = drawn(5, 0)
    scaled, cosines = kernel_features(features), F.cosine_similarity(features[:, None], features[None], dim=2)
    assert torch.allclose(scaled @ scaled.T / 16, cosines.double())


def test_classifier_test_of_equal_and_of_separable_sets():
    equal = [classifier_test(drawn(60, 2 * n), drawn(60, 2 * n + 1)) for n in range(20)]
    assert np.mean(equal) == pytest.approx(0.5, abs=0.03)
    assert classifier_test(drawn(60, 0), drawn(60, 1, shift=3.0)) > 0.999


def test_classifier_test_by_hand():
    """Ten people on each side, of a face each: scikit-learn's folds are two people of each side."""
    real, generated = drawn(10, 0).double().numpy(), drawn(10, 1, shift=0.4).double().numpy()
    # GroupKFold deals people of equal size into folds from the last one
    folds = np.arange(10)[::-1] % 5
    areas = []
    for fold in range(5):
        scale = StandardScaler().fit(np.concatenate([real[folds != fold], generated[folds != fold]]))
        labels = np.repeat([0, 1], 8)
        learned = scale.transform(np.concatenate([real[folds != fold], generated[folds != fold]]))
        classifier = LogisticRegression(C=0.01, max_iter=500).fit(learned, labels)
        ours, theirs = (classifier.decision_function(scale.transform(x[folds == fold])) for x in (generated, real))
        areas.append(np.mean([a > b for a in ours for b in theirs]))
    assert classifier_test(torch.from_numpy(real), torch.from_numpy(generated)) == pytest.approx(np.mean(areas))


def test_the_classifier_is_not_tested_on_people_that_it_knows():
    """Faces of a person are one face here. A classifier that knew the person would know the side."""
    people = np.repeat(np.arange(12), 8).tolist()
    real, generated = (drawn(12, seed, dimensions=64)[people] for seed in (0, 1))
    assert classifier_test(real, generated) > 0.95
    assert classifier_test(real, generated, people, people) < 0.75


def test_the_same_input_gives_the_same_figures():
    real, generated = drawn(40, 0), drawn(40, 1)
    assert measure_realism(real, generated) == measure_realism(real, generated)
    assert kernel_distance(real, generated, seed=1)[1] != kernel_distance(real, generated, seed=2)[1]


def test_features_that_cannot_be_compared():
    wrong = drawn(20, 0)
    wrong[3, 1] = float("nan")
    cases = [
        (kernel_distance, (drawn(1, 0), drawn(20, 1)), "1 real faces: KID needs two"),
        (kernel_distance, (drawn(20, 0), drawn(0, 1)), "0 generated faces: KID needs two"),
        (kernel_distance, (drawn(20, 1), wrong), "1 generated faces are not finite, such as of face 3"),
        (kernel_distance, (drawn(20, 1), drawn(20, 1, 8)), r"are \(20, 16\) and \(20, 8\)"),
        (classifier_test, (drawn(20, 0), drawn(4, 1)), "4 generated faces of 4 people: .* needs 5 people"),
        (classifier_test, (drawn(20, 0), drawn(20, 1), [0, 1] * 10), "20 real faces of 2 people"),
        (classifier_test, (wrong, drawn(20, 1)), "1 real faces are not finite"),
    ]
    for measure, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            measure(*arguments)
    value, spread = kernel_distance(drawn(3, 0), drawn(20, 1))
    assert np.isfinite(value) and np.isnan(spread)


def test_one_face_of_each_person_first():
    names = ["a"] * 6 + ["b"] * 2 + ["c"] * 3
    for number, expected in ((2, 1), (3, 1), (5, 2), (9, 4), (11, 6), (50, 6)):
        chosen = choose_spread(names, number, seed=1)
        counts = [sum(names[position] == name for position in chosen) for name in "abc"]
        assert chosen == sorted(set(chosen)) and len(chosen) == min(number, 11)
        assert max(counts) == expected
        others = [min(count, sum(n == name for n in names)) for count, name in zip(counts, "abc", strict=True)]
        # nobody has two more than another who has faces left
        left = [name for name, count in zip("abc", counts, strict=True) if count < names.count(name)]
        assert all(max(counts) - others["abc".index(name)] <= 1 for name in left)
    assert choose_spread(names, 3, seed=1) == choose_spread(names, 3, seed=1)
    assert len({tuple(choose_spread(names, 3, seed)) for seed in range(20)}) > 5


PEOPLE = [f"person {number}" for number in range(12)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """ROOT/set of six people, ROOT/real of twelve, ROOT/flat of sixteen pictures and nothing else, pack `toy`."""
    root = tmp_path_factory.mktemp("realism")
    write_set(root / "set", PEOPLE[:6], images=3)
    write_set(root / "real", PEOPLE, images=2, seed=1)
    write_set(root / "pictures", [f"{number:02d}" for number in range(16)], images=1, seed=2)
    (root / "flat").mkdir()
    for file in sorted((root / "pictures").glob("*/*.png")):
        shutil.copy(file, root / "flat" / f"{file.parent.name}.png")
    (root / "flat" / "notes.txt").touch()
    write_toy_pack(root / "packs", "toy")
    return root


@pytest.fixture(scope="module")
def arguments(workspace, backbone) -> list[str]:
    pack = ["--encoder", "toy", "--encoder-root", str(workspace / "packs"), "--det-size", "160"]
    return ["evaluate", str(workspace / "set"), *pack, "--lpips-backbone", str(backbone), "--neighbors", "2"]


@pytest.fixture(scope="module")
def report(workspace, arguments) -> dict:
    real = ["--real", str(workspace / "real"), "--real", str(workspace / "flat")]
    cli.main([*arguments, *real, "--output", str(workspace / "report")])
    return load_report(workspace / "report")


def test_halves_share_nobody_and_take_equal_parts(workspace):
    sets = [FaceSet(open_faces(workspace / name)) for name in ("real", "flat")]
    halves = real_halves(sets, 11)
    for half in halves:
        files = [photograph.file for photograph in half.photographs]
        assert [sum(file.startswith(f"{number}/") for file in files) for number in (1, 2)] == [5, 5]
        assert len(half.identities) == 10  # nobody twice: there are six of each set
    assert not set(halves[0].names) & set(halves[1].names)
    assert [half.key for half in real_halves(sets, 11)] == [half.key for half in halves]
    # a picture is read from its own set
    position = next(i for i, photograph in enumerate(halves[0].photographs) if photograph.file.startswith("2/"))
    name = halves[0].photographs[position].file.removeprefix("2/")
    assert np.array_equal(np.asarray(halves[0].read(position)), np.asarray(PIL.Image.open(workspace / "flat" / name)))
    with pytest.raises(ValueError, match="24 faces of 12 people give two halves of 4 faces of 4 people"):
        real_halves(sets[:1], 4)
    with pytest.raises(ValueError, match="two of the sets of real faces are the same"):
        real_halves([sets[0], *sets], 10)


def test_a_folder_of_pictures_is_a_set(workspace, tmp_path):
    """Only if there is nothing else to read in it; what is left out is named."""
    folder = shutil.copytree(workspace / "flat", tmp_path / "flat")
    (folder / "@eaDir").mkdir()
    shutil.copy(folder / "00.png", folder / "@eaDir" / "thumbnail.png")
    shutil.copy(folder / "00.png", folder / ".hidden.png")
    source = open_faces(folder)
    assert [photograph.file for photograph in source.photographs] == [f"{number:02d}.png" for number in range(16)]
    assert len({photograph.identity for photograph in source.photographs}) == 16
    hidden = {name for name, reason in source.left_out.items() if reason == "hidden or system file"}
    assert hidden == {"@eaDir/thumbnail.png", ".hidden.png"} and source.left_out.keys() - hidden == {"notes.txt"}
    (folder / "anna").mkdir()
    shutil.copy(folder / "00.png", folder / "anna" / "0.png")
    source = open_faces(folder)
    assert [photograph.file for photograph in source.photographs] == ["anna/0.png"]
    assert source.left_out["00.png"] == "in no identity's folder"
    with pytest.raises(ValueError, match="has no photographs"):
        open_faces(workspace / "packs" / "models")


def test_evaluate_measures_realism(report, workspace, backbone):
    """Both networks, by hand."""
    found, notes = figures(report), " ".join(report["notes"])
    names = [f"{kind}/{network}" for network in ("alexnet", "toy") for kind in ("kid", "kid_std", "kid_real")]
    assert set(names) <= found.keys() and {"c2st/alexnet", "c2st_real/toy"} <= found.keys()
    assert "notes.txt" in notes and "Not measured" not in notes
    ours = FaceSet(open_faces(workspace / "set"))
    halves = real_halves([FaceSet(open_faces(workspace / name)) for name in ("real", "flat")], 18)
    chosen = ours.take(choose_spread(ours.names, len(halves[0])))
    network = LpipsGridFeatures(load_lpips("alex", backbone))
    features = [network(each.pixels(range(len(each)))) for each in (chosen, *halves)]
    expected = measure_realism(features[1], features[0], halves[0].names, chosen.names)
    noise = measure_realism(features[1], features[2], halves[0].names, halves[1].names)
    assert found["kid/alexnet"] == pytest.approx(expected.kid, rel=1e-4)
    assert found["kid_std/alexnet"] == pytest.approx(expected.kid_std, rel=1e-4)
    assert found["kid_real/alexnet"] == pytest.approx(noise.kid, abs=1e-6)
    assert found["c2st/alexnet"] == pytest.approx(expected.c2st, abs=1e-6)
    assert found["c2st_real/alexnet"] == pytest.approx(noise.c2st, abs=1e-6)
    (kid,) = [each for each in report["figures"] if each["name"] == "kid/alexnet"]
    assert kid["unit"] == "x 1000" and kid["label"] == "KID by alexnet"
    conditions = kid["conditions"]
    assert (conditions["images"], conditions["identities"], conditions["real identities"]) == (16, 6, 14)
    assert conditions["real"].startswith("real + flat ")
    assert kid["detail"] == "16 faces of 6 identities against 16 of 14; the other half is 16 of 14."


def test_the_page_and_the_comparison_show_thousandths(report, workspace, tmp_path):
    (kid,) = [each["value"] for each in report["figures"] if each["name"] == "kid/alexnet"]
    assert f"{1000 * kid:.1f} / 1000" in (workspace / "report" / "report.html").read_text()
    other = json.loads(json.dumps(report))
    for each in other["figures"]:
        if each["name"].endswith("/toy"):
            each["conditions"]["identities"] = 3
    lines = compare_reports([report, other]).lines()
    (row,) = [line for line in lines if line.startswith("KID by alexnet")]
    assert row.count(f"{1000 * kid:.1f} / 1000") == 2
    rows = [line for line in lines if line.startswith("KID by toy")]
    assert len(rows) == 2
    notes = [line for line in lines if "Measured with different conditions" in line]
    assert len(notes) == 1 and "KID" in notes[0] and "identities: 6 | 3" in notes[0]


def test_too_few_people_are_a_note(workspace, arguments, backbone, tmp_path, capsys):
    """Precision and recall are measured all the same."""
    write_set(tmp_path / "few", ["a", "b"], images=4)
    cli.main([*arguments, "--real", str(tmp_path / "few"), "--output", str(tmp_path / "output")])
    assert "8 faces of 2 people give two halves of 4 faces of 1 people" in capsys.readouterr().out
    found = load_report(tmp_path / "output")
    assert "precision" in figures(found) and "kid/alexnet" not in figures(found)
    options = {"real": workspace / "real", "perceptual": load_lpips("alex", backbone)}
    encoder = FaceEncoder("toy", str(workspace / "packs"), det_size=160)
    found = evaluate_dataset(tmp_path / "few", tmp_path / "other", encoder, neighbors=2, **options)
    assert any("8 faces of 2 identities: KID and the classifier test need 5" in note for note in found["notes"])


def test_grid_features_are_alexnets_relus(backbone):
    """The network that the first measurements were made with, layer by layer."""
    weights = load_file(backbone)
    faces = [np.random.default_rng(n).integers(0, 256, (128, 128, 3), np.uint8) for n in range(3)]
    pixels = face_pixels(faces)
    assert pixels.shape == (3, 3, 112, 112) and -1 <= pixels.min() < -0.5 and 0.5 < pixels.max() <= 1
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    hidden = F.interpolate((pixels / 2 + 0.5 - mean) / std, (128, 128), mode="bilinear", antialias=True)
    parts = []
    for number, layer in enumerate(ALEXNET, start=1):
        if number in (2, 3):
            hidden = F.max_pool2d(hidden, 3, 2)
        padding, stride = {1: (2, 4), 2: (2, 1)}.get(number, (1, 1))
        weight, bias = (weights[f"features.{layer}.{kind}"] for kind in ("weight", "bias"))
        hidden = F.conv2d(hidden, weight, bias, stride, padding).relu()
        if number in (2, 3, 5):
            parts.append(F.normalize(F.adaptive_avg_pool2d(hidden, 4).flatten(1)))
    cosines = torch.cat(parts, dim=1) @ torch.cat(parts, dim=1).T
    network = LpipsGridFeatures(load_lpips("alex", backbone))
    features = network(pixels)
    assert network.network == "alexnet" and features.shape == (3, 13312)
    assert torch.allclose(features @ features.T / 13312, cosines, atol=1e-4)


def test_real_faces_look_real_and_blurred_ones_do_not(assets):
    backbone = assets / "perceptual" / "alexnet_features.safetensors"
    network = LpipsGridFeatures(load_lpips("alex", backbone))
    half, other = real_halves([FaceSet(open_faces(assets / "lfw_devtest_112"))], 60)
    pixels = [each.pixels(range(60)) for each in (half, other)]
    blurred = F.interpolate(F.interpolate(pixels[1], (28, 28), mode="area"), (112, 112), mode="bilinear")
    real, others, blurs = (network(each) for each in (*pixels, blurred))
    noise, found = measure_realism(real, others), measure_realism(real, blurs)
    assert abs(noise.kid) < 2 * noise.kid_std and noise.c2st < 0.65
    assert found.kid > 10 * found.kid_std and found.c2st > 0.95
