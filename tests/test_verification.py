import io
import itertools
import json
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import draw_person
from sklearn.model_selection import KFold
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, ViTImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from uiface_diffusers import cli
from uiface_diffusers.evaluation import (
    equal_error_rate,
    load_recognizer,
    measure_verification,
    verification_table,
    verify_benchmarks,
)
from uiface_diffusers.evaluation.recognizers import ModelRecognizer
from uiface_diffusers.evaluation.verification import fold_accuracies, roc, true_accept_interval, true_accept_rate
from uiface_diffusers.faces import FaceEncoder, unit_embeddings


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


def pairs_of_people(number: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of `number` pairs, alternately of one person and of two, of differing lengths."""
    generator = np.random.default_rng(seed)
    same = np.arange(number) % 2 == 0
    first, other = generator.normal(size=(2, number, 16))
    second = np.where(same[:, None], first, other)
    features = np.stack([first, second], 1).reshape(-1, 16) + noise * generator.normal(size=(2 * number, 16))
    return features * generator.uniform(1, 30, (2 * number, 1)), same


def brute_force_accuracies(features: np.ndarray, same: np.ndarray) -> tuple[list[float], list[float]]:
    """The protocol read aloud: unit vectors, squared distances, all thresholds of 0 to 4 by 0.01, ten folds."""
    distances, same = [], np.array(same)
    for first, second in zip(features[::2], features[1::2], strict=True):
        difference = first / np.sqrt(sum(first**2)) - second / np.sqrt(sum(second**2))
        distances.append(sum(difference**2))
    distances = np.array(distances)

    def accuracy(threshold, pairs):
        return np.mean((distances[pairs] < threshold) == same[pairs])

    accuracies, thresholds = [], []
    for others, fold in KFold(10, shuffle=False).split(distances):
        best = max(np.arange(0, 4, 0.01), key=lambda threshold: accuracy(threshold, others))  # noqa: B023
        accuracies.append(accuracy(best, fold))
        thresholds.append(best)
    return accuracies, thresholds


def brute_force_eer(genuine: list[float], impostor: list[float]) -> float:
    """Where the line through the errors at all thresholds crosses that of equal ones."""
    points = [
        (sum(i >= t for i in impostor) / len(impostor), sum(g < t for g in genuine) / len(genuine))
        for t in sorted([2, *genuine, *impostor], reverse=True)
    ]
    for (accepted, rejected), (more, less) in itertools.pairwise(points):
        if rejected >= accepted and less <= more:
            if rejected - less == accepted - more:
                return accepted
            share = (rejected - accepted) / (rejected - less + more - accepted)
            return accepted + share * (more - accepted)


@pytest.mark.parametrize(("number", "noise"), [(60, 0.0), (60, 1.0), (137, 0.7)])
def test_all_measures_by_brute_force(number, noise):
    features, same = pairs_of_people(number, noise)
    result = measure_verification(features, same, far=(0.2, 0.05, 0.01))
    accuracies, thresholds = brute_force_accuracies(features, same)
    assert np.allclose(result.fold_accuracies, accuracies, atol=1e-12)
    assert result.accuracy == pytest.approx(sum(accuracies) / 10, abs=1e-12)
    variance = sum((a - sum(accuracies) / 10) ** 2 for a in accuracies) / 10
    assert result.accuracy_std == pytest.approx(variance**0.5, abs=1e-9)
    assert result.threshold == pytest.approx(sum(1 - t / 2 for t in thresholds) / 10, abs=1e-9)

    cosines = [a @ b / (a @ a * (b @ b)) ** 0.5 for a, b in zip(features[::2], features[1::2], strict=True)]
    genuine = [c for c, s in zip(cosines, same, strict=True) if s]
    impostor = [c for c, s in zip(cosines, same, strict=True) if not s]
    assert np.allclose(result.genuine, genuine, atol=1e-12) and np.allclose(result.impostor, impostor, atol=1e-12)
    # one impostor pair of a hundred cannot be told among 30 or 68
    assert list(result.tar_at_far) == [0.2, 0.05]
    for far, rate in result.tar_at_far.items():
        tars = [
            sum(g > t for g in genuine) / len(genuine)
            for t in [-2, *cosines]
            if sum(i > t for i in impostor) / len(impostor) <= far
        ]
        assert rate.rate == pytest.approx(max(tars), abs=1e-12)
        assert sum(i > rate.threshold for i in result.impostor) <= far * len(impostor)
        assert rate.low <= rate.rate <= rate.high
    assert result.eer == pytest.approx(brute_force_eer(genuine, impostor), abs=1e-9)


def test_the_curve_by_brute_force():
    generator = np.random.default_rng(0)
    # with ties within and between the kinds
    genuine, impostor = generator.integers(3, 12, 40) / 10, generator.integers(0, 9, 70) / 10
    accepted, right = roc(genuine, impostor)
    points = {(0.0, 0.0)}
    for threshold in (*genuine, *impostor):
        points.add((sum(i >= threshold for i in impostor) / 70, sum(g >= threshold for g in genuine) / 40))
    assert np.allclose(sorted(points), np.stack([accepted, right], 1), atol=1e-12)
    assert (accepted[-1], right[-1]) == (1, 1)


def test_the_intervals_are_those_of_resampled_pairs():
    """Of another generator, with loops; and where nothing varies they are Wilson's."""
    generator = np.random.default_rng(1)
    genuine, impostor = generator.normal(2, 1, 150), generator.normal(0, 1, 200)
    rates = []
    for _ in range(1500):
        some = sorted(generator.choice(impostor, 200), reverse=True)
        rates.append(np.mean([g > some[4] for g in generator.choice(genuine, 150)]))
    low, high = true_accept_interval(genuine, impostor, 0.02)
    assert (low, high) == pytest.approx(np.quantile(rates, [0.025, 0.975]), abs=0.04)
    assert high - low > 0.1 and low < true_accept_rate(genuine, impostor, 0.02)[0] < high
    # of pairs that are all right every resample is, too: Wilson's interval of 150 of 150 in its closed form
    expected = (1 / (1 + 1.96**2 / 150), 1)
    assert true_accept_interval(genuine + 9, impostor, 0.02) == pytest.approx(expected, abs=1e-9)


def test_false_accept_rates_are_reached_not_passed():
    """0.29 * 100 is 28.999999999999996 in floating point, and yet 29 impostors."""
    genuine, impostor = np.array([0.705, 0.715, 0.9]), np.arange(100) / 100
    assert true_accept_rate(genuine, impostor, 0.29) == (1, 0.7)
    assert true_accept_rate(genuine, impostor, 0.285)[0] == pytest.approx(2 / 3)


def test_the_threshold_comes_from_the_other_folds():
    """By hand: each half is measured at what is best for the other one; of several, the smallest."""
    distances = np.array([0.1, 0.3, 0.6, 0.9] + [0.2, 0.5, 0.8, 1.2])
    same = np.array([True, False, False, False] + [True, True, True, False])
    thresholds = np.array([0.15, 0.2, 0.25, 0.55, 0.85, 0.9])
    accuracies, chosen = fold_accuracies(distances, same, thresholds, num_folds=2)
    # the second half is all right at 0.85 and 0.9: 0.85 accepts two impostors of the first half; that is all right
    # from 0.15 to 0.25: 0.15 rejects all genuine pairs of the second
    assert chosen.tolist() == [0.85, 0.15] and accuracies.tolist() == [0.5, 0.25]
    # a fold more than can be divided: the first ones are longer
    accuracies, _ = fold_accuracies(distances[:7], same[:7], np.array([5.0]), num_folds=3)
    assert accuracies.tolist() == [1 / 3, 1 / 2, 1]


def test_what_cannot_be_measured_is_named():
    features, same = pairs_of_people(20, 0.5)
    with pytest.raises(ValueError, match=r"\(38, 16\) embeddings for 20 pairs"):
        measure_verification(features[:-2], same)
    with pytest.raises(ValueError, match="8 pairs cannot be split into 10 folds"):
        measure_verification(features[:16], same[:8])
    with pytest.raises(ValueError, match="20 genuine and 0 impostor"), pytest.warns(UserWarning):
        measure_verification(features, np.ones(20, bool))
    features[7] = 0
    features[9, 3] = np.nan
    with pytest.raises(ValueError, match="2 embeddings are zero or not finite, as that of image 7"):
        measure_verification(features, same)


def test_folds_of_one_kind_are_warned_of():
    features, same = pairs_of_people(40, 0.5)
    order = np.argsort(~same, kind="stable")
    sorted_features = features.reshape(40, 2, 16)[order].reshape(80, 16)
    with pytest.warns(UserWarning, match="all genuine or all impostor"):
        measure_verification(sorted_features, same[order])


def face_png(generator: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(generator.integers(0, 256, (112, 112, 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def benchmarks(tmp_path):
    """Two files of 20 pairs of 30 pictures of noise."""
    for number, name in enumerate(("b", "a")):
        generator = np.random.default_rng(number)
        pictures = [face_png(generator) for _ in range(30)]
        images = [pictures[place] for place in generator.integers(0, 30, 40)]
        same = [bool(place % 2) for place in range(20)]
        for place in range(0, 20, 3):  # some genuine pairs are of one picture
            images[2 * place] = images[2 * place + 1]
        (tmp_path / "benchmarks").mkdir(exist_ok=True)
        (tmp_path / "benchmarks" / f"{name}.bin").write_bytes(pickle.dumps((images, same)))
    (tmp_path / "benchmarks" / "notes.txt").write_text("no benchmark")
    return tmp_path / "benchmarks"


class Embedder:
    """A function of faces as a recognizer."""

    name, fingerprint = "noise", "0" * 12

    def __init__(self, function, image_size=112):
        self.function, self.image_size = function, image_size

    def __call__(self, faces):
        return self.function(faces)


def features_of(face: np.ndarray) -> np.ndarray:
    """Not the same of the mirror image, and not linear."""
    return (face.astype(np.float64).reshape(8, 14, 8, 14, 3).mean(axis=(1, 3)).reshape(-1) / 50) ** 3


def test_benchmarks_are_verified_by_face_and_mirror_image(benchmarks):
    seen = []

    def embed(faces):
        assert faces.dtype == np.uint8 and faces.shape[1:] == (112, 112, 3) and len(faces) <= 64
        seen.extend(face.tobytes() for face in faces)
        return np.stack([features_of(face) for face in faces]).astype(np.float32)

    results = verify_benchmarks(Embedder(embed), benchmarks)
    assert list(results) == ["a", "b"]
    images, same = pickle.loads((benchmarks / "a.bin").read_bytes())
    faces = [np.asarray(PIL.Image.open(io.BytesIO(image))) for image in images]
    features = np.stack([features_of(face) + features_of(face[:, ::-1]) for face in faces])
    accuracies, _ = brute_force_accuracies(features, same)
    assert np.allclose(results["a"].fold_accuracies, accuracies, atol=1e-12)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert np.allclose(results["a"].genuine, (unit[::2] * unit[1::2]).sum(axis=1)[same], atol=1e-6)
    assert len(set(seen)) == len(seen)  # a picture of several pairs is embedded once
    (alone,) = verify_benchmarks(Embedder(embed), benchmarks / "b.bin").values()
    assert alone.to_dict() == results["b"].to_dict()


def test_all_benchmarks_are_read_before_the_first_is_measured(benchmarks):
    (benchmarks / "z.bin").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="z.bin cannot be read"):
        verify_benchmarks(Embedder(lambda faces: pytest.fail("measured")), benchmarks)
    with pytest.raises(ValueError, match="has no .bin files"):
        verify_benchmarks(Embedder(lambda faces: pytest.fail("measured")), benchmarks.parent)


def test_the_table_leaves_out_what_so_few_pairs_cannot_tell():
    results = {name: measure_verification(*pairs_of_people(40, noise)) for name, noise in (("x", 0), ("yy", 1))}
    lines = verification_table(results).splitlines()
    assert lines[0].split()[:4] == ["benchmark", "pairs", "accuracy", "EER"] and "TAR@FAR 0.0001" in lines[0]
    assert lines[1].split() == "x 40 100.00 +- 0.00 0.00 100.00 [83.89, 100.00] - - -".split()
    mean = 50 * (results["x"].accuracy + results["yy"].accuracy)
    assert lines[3].split() == ["mean", f"{mean:.2f}"]
    assert len(verification_table({"x": results["x"]}).splitlines()) == 2


def test_packs_give_features_that_are_not_normalized(toy_root):
    encoder = FaceEncoder("toy", str(toy_root))
    recognizer = load_recognizer("toy", toy_root)
    faces = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), np.uint8)
    features = recognizer(faces)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    assert recognizer.name == "toy" and (np.abs(lengths - 1) > 0.1).all()
    assert np.allclose(features / lengths, encoder.embed_aligned(list(faces)), atol=1e-6)
    with pytest.raises(ValueError, match="`absent`"):
        load_recognizer("absent", toy_root)


def test_faces_have_the_size_that_the_recognizer_takes(benchmarks):
    sizes = set()

    def embed(faces):
        sizes.add(faces.shape[1:])
        return faces[:, ::8, ::8].reshape(len(faces), -1).astype(np.float32)

    verify_benchmarks(Embedder(embed, 64), benchmarks / "a.bin")
    assert sizes == {(64, 64, 3)}


def test_recognizers_of_both_kinds_say_what_they_are(toy_root):
    """The protocol's name, fingerprint and image size; other weights, another fingerprint."""
    pack, model = FaceEncoder("toy", str(toy_root)), ToyModel(ToyConfig())
    processor = ViTImageProcessor(size={"height": 112, "width": 112})
    ours = ModelRecognizer(model, processor, "ours")
    for recognizer in (pack, ours):
        assert recognizer.image_size == 112 and len(recognizer.fingerprint) == 12
        faces = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), np.uint8)
        features = recognizer(faces)
        assert features.dtype == np.float32 and np.array_equal(features, recognizer(list(faces)))
        unit = unit_embeddings(recognizer, faces, batch_size=2)
        assert np.allclose(unit, features / np.linalg.norm(features, axis=1, keepdims=True), atol=1e-6)
    before = ours.fingerprint
    model.linear.bias.data += 1
    assert (pack.name, ours.name) == ("toy", "ours") and ours.fingerprint != before


class ToyConfig(PretrainedConfig):
    model_type = "toy_face_recognition"


class ToyModel(PreTrainedModel):
    """Of the form of this package's recognizer."""

    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(3 * 49, 8)
        self.gives_embeddings = not getattr(config, "other_output", False)
        self.post_init()

    def forward(self, pixel_values):
        features = self.linear(nn.functional.adaptive_avg_pool2d(pixel_values, 7).flatten(1))
        if not self.gives_embeddings:
            return BaseModelOutputWithPooling(pooler_output=features)
        return ModelOutput(embeddings=features)


def test_models_of_transformers(tmp_path, benchmarks):
    AutoConfig.register("toy_face_recognition", ToyConfig, exist_ok=True)
    AutoModel.register(ToyConfig, ToyModel, exist_ok=True)
    half = [0.5, 0.5, 0.5]
    processor = ViTImageProcessor(size={"height": 112, "width": 112}, image_mean=half, image_std=half)
    for name, config in (("ours", ToyConfig()), ("other", ToyConfig(other_output=True))):
        ToyModel(config).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    recognizer = load_recognizer(tmp_path / "ours", device="cpu")
    faces = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), np.uint8)
    pixels = torch.from_numpy(faces).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = ToyModel.from_pretrained(tmp_path / "ours")(pixels).embeddings.numpy()
    assert recognizer.name == "ours" and np.allclose(recognizer(faces), expected, atol=1e-5)
    assert verify_benchmarks(recognizer, benchmarks)["a"].fold_accuracies.shape == (10,)
    with pytest.raises(ValueError, match="`other` is a ToyModel, which gives no `embeddings`"):
        load_recognizer(tmp_path / "other", device="cpu")(faces)
    with pytest.raises(OSError, match="nowhere"):
        load_recognizer(tmp_path / "nowhere")


def test_from_photographs_to_figures(toy_root, tmp_path, capsys):
    """`make-benchmark`, then `verify`: the figures are those of the encoder's own embeddings."""
    colors = [(0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (255, 255, 0)]
    for person, color in enumerate(colors):
        (tmp_path / "photographs" / f"p{person}").mkdir(parents=True)
        for index in range(1, 5):
            photograph = draw_person(color, ((78 + 2 * index, 80, 44),))
            photograph.save(tmp_path / "photographs" / f"p{person}" / f"p{person}_{index:04d}.png")
    lines = ["10\t1"]
    for fold in range(10):
        first, second = 1 + 2 * (fold // 5), 2 + 2 * (fold // 5)
        lines += [f"p{fold % 5}\t{first}\t{second}", f"p{fold % 5}\t{first}\tp{(fold + 1) % 5}\t{second}"]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    pack = ["--encoder-root", str(toy_root)]
    arguments = ["--pairs", str(tmp_path / "pairs.txt"), "--images", str(tmp_path / "photographs")]
    arguments += ["--output", str(tmp_path / "benchmarks" / "toy.bin"), "--encoder", "toy", "--det-size", "160"]
    cli.main(["make-benchmark", *arguments, *pack])
    assert "20 pairs of 20 photographs" in capsys.readouterr().out
    output = tmp_path / "figures"
    cli.main(["verify", "toy", "--benchmarks", str(tmp_path / "benchmarks"), "--output", str(output), *pack])
    printed = capsys.readouterr().out
    report = json.loads((output / "verification.json").read_text())
    measured = report["benchmarks"]["toy"]
    assert report["recognizer"] == "toy" and measured["genuine_pairs"] == measured["impostor_pairs"] == 10
    assert f"{100 * measured['accuracy']:.2f} +- {100 * measured['accuracy_std']:.2f}" in printed
    assert PIL.Image.open(output / "roc.png").size[0] > 300
    assert sorted(path.name for path in output.iterdir()) == ["roc.png", "verification.json"]

    recognizer = load_recognizer("toy", toy_root)
    images, same = pickle.loads((tmp_path / "benchmarks" / "toy.bin").read_bytes())
    faces = np.stack([np.asarray(PIL.Image.open(io.BytesIO(image))) for image in images])
    accuracies, _ = brute_force_accuracies(recognizer(faces) + recognizer(faces[:, :, ::-1]), same)
    assert measured["fold_accuracies"] == pytest.approx(accuracies, abs=1e-9)
    assert measured["tar_at_far"].keys() == {"0.1"}

    # the same in one command
    arguments[arguments.index("--output") + 1] = str(tmp_path / "at_once")
    cli.main(["verify", "toy", *arguments, *pack])
    (at_once,) = json.loads((tmp_path / "at_once" / "verification.json").read_text())["benchmarks"].values()
    assert at_once == measured
    with pytest.raises(SystemExit, match="give either --benchmarks, or --pairs with --images"):
        cli.main(["verify", "toy", "--pairs", str(tmp_path / "pairs.txt"), *pack])


def test_the_command_line_names_the_problem(toy_root, tmp_path):
    (tmp_path / "cut.bin").write_bytes(b"")
    for benchmarks, message in ((tmp_path / "cut.bin", "cut.bin cannot be read"), (tmp_path / "no.bin", "no.bin")):
        with pytest.raises(SystemExit, match=f"uiface verify: .*{message}"):
            cli.main(["verify", "toy", "--encoder-root", str(toy_root), "--benchmarks", str(benchmarks)])
