import io
import json
import pickle

import numpy as np
import PIL.Image
import pytest

from uiface_diffusers import cli
from uiface_diffusers.data import read_benchmark
from uiface_diffusers.evaluation import corrupt, load_recognizer, measure_verification, verify_corruptions
from uiface_diffusers.evaluation.corruptions import CORRUPTIONS
from uiface_diffusers.evaluation.verification import embed_benchmark


def smooth_faces(number: int, side: int = 112, seed: int = 0) -> np.ndarray:
    """Noise at several scales: `(number, side, side, 3)` bytes."""
    generator = np.random.default_rng(seed)
    total = 0
    for cells in (4, 14, 56):
        noise = generator.integers(0, 256, (number, cells, cells, 3), np.uint8)
        pictures = [PIL.Image.fromarray(each).resize((side, side), PIL.Image.Resampling.BICUBIC) for each in noise]
        total = total + np.stack(pictures).astype(float)
    return np.round(total / 3).astype(np.uint8)


def distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(float) - second).mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_strengths_grow_and_are_the_same_again(name):
    faces = smooth_faces(6)
    before = faces.copy()
    corrupted = [corrupt(faces, name, strength, seed=3) for strength in range(1, 6)]
    assert np.array_equal(faces, before)
    assert all(each.dtype == np.uint8 and each.shape == faces.shape for each in corrupted)
    distances = [distance(each, faces) for each in corrupted]
    assert 0 < distances[0] and distances == sorted(distances) and len(set(distances)) == 5
    # by seed and position, whatever else is in the batch
    some = corrupt(faces[[4, 1]], name, 3, seed=3, positions=[4, 1])
    assert np.array_equal(some, corrupted[2][[4, 1]])


@pytest.mark.parametrize("name", ["occlusion", "darkness"])
def test_draws_differ_by_seed_and_position(name):
    faces = np.repeat(smooth_faces(1), 3, 0)
    drawn = corrupt(faces, name, 3)
    assert distance(drawn[0], drawn[1]) > 0 and distance(drawn, corrupt(faces, name, 3, seed=1)) > 0
    assert np.array_equal(drawn, corrupt(faces, name, 3, seed=0))


def test_corruptions_are_what_they_say():
    faces = smooth_faces(4)
    for strength, share in zip(range(1, 6), CORRUPTIONS["occlusion"].parameters, strict=True):
        covered = corrupt(np.zeros_like(faces), "occlusion", strength)
        assert np.isin(covered, (0, 128)).all()
        assert (covered == 128).mean() == pytest.approx(share, abs=0.01)
    for strength, stops in enumerate(CORRUPTIONS["darkness"].parameters, start=1):  # in linear light, on average
        gray = np.full((1, 112, 112, 3), 200, np.uint8)
        light = (corrupt(gray, "darkness", strength) / 255) ** 2.2
        assert light.mean() == pytest.approx((200 / 255) ** 2.2 / 2**stops, rel=0.03)
        # shot noise: the variance of photons is their number
        assert light.var() * 1000 == pytest.approx(light.mean(), rel=0.15)
    buffer = io.BytesIO()
    PIL.Image.fromarray(faces[2]).save(buffer, "jpeg", quality=10, subsampling="4:2:0")
    assert np.array_equal(corrupt(faces, "jpeg", 4)[2], np.asarray(PIL.Image.open(buffer)))
    # 28 of 112 pixels: each is the mean of sixteen
    means = faces.reshape(4, 28, 4, 28, 4, 3).mean(axis=(2, 4))
    small = corrupt(faces, "low_resolution", 3).reshape(4, 28, 4, 28, 4, 3).mean(axis=(2, 4))
    assert distance(means, small) < 3 < distance(corrupt(faces, "low_resolution", 3), faces)
    # a line becomes Gauss's bell, at any size of face
    for side in (112, 224):
        line = np.zeros((1, side, side, 3), np.uint8)
        line[:, :, side // 2] = 255
        bell = corrupt(line, "blur", 3)[0, 5, :, 0].astype(float)
        variance = (bell * (np.arange(side) - side // 2) ** 2).sum() / bell.sum()
        assert variance == pytest.approx((2.0 * side / 112) ** 2, rel=0.1)


def test_what_cannot_be_corrupted_is_named():
    faces = smooth_faces(2)
    with pytest.raises(ValueError, match="'fog' is no corruption: blur, low_resolution"):
        corrupt(faces, "fog", 1)
    with pytest.raises(ValueError, match="1 to 5, not 6"):
        corrupt(faces, "blur", 6)
    for wrong in (faces.astype(float), faces[:, :100], faces[0], faces[..., :1]):
        with pytest.raises(ValueError, match="side, side, 3"):
            corrupt(wrong, "blur", 1)


@pytest.fixture
def benchmark_file(tmp_path):
    """20 pairs: of one person if the faces differ by little noise."""
    people, other = smooth_faces(20, side=56), smooth_faces(20, side=56, seed=1)
    noise = np.random.default_rng(2).integers(-20, 21, people.shape)
    same = [place % 2 == 0 for place in range(20)]
    images = []
    for place in range(20):
        second = np.clip(people[place] + noise[place], 0, 255).astype(np.uint8) if same[place] else other[place]
        for face in (people[place], second):
            buffer = io.BytesIO()
            PIL.Image.fromarray(face).save(buffer, "png")
            images.append(buffer.getvalue())
    (tmp_path / "noise.bin").write_bytes(pickle.dumps((images, same)))
    return tmp_path / "noise.bin"


def test_accuracy_by_corruption_and_strength(benchmark_file, toy_root, tmp_path, capsys):
    recognizer, benchmark = load_recognizer("toy", toy_root), read_benchmark(benchmark_file)
    clean = measure_verification(embed_benchmark(recognizer, benchmark), benchmark.same)
    calls = []
    result = verify_corruptions(
        recognizer,
        benchmark,
        clean,
        ["occlusion"],
        seed=5,
        done=lambda so_far: calls.append(len(so_far.accuracy["occlusion"])),
    )
    assert result.clean == clean.accuracy and calls == [1, 2, 3, 4, 5]
    for strength in (1, 5):
        faces = corrupt(np.stack([benchmark.face(place) for place in range(40)]), "occlusion", strength, seed=5)
        features = recognizer(faces) + recognizer(np.ascontiguousarray(faces[:, :, ::-1]))
        expected = measure_verification(features, benchmark.same)
        assert result.accuracy["occlusion"][strength - 1] == pytest.approx(expected.accuracy, abs=1e-9)
        right = np.sum(expected.genuine > clean.threshold) + np.sum(expected.impostor <= clean.threshold)
        assert result.at_clean_threshold["occlusion"][strength - 1] == pytest.approx(right / 20, abs=1e-9)

    arguments = [
        "verify",
        "toy",
        "--encoder-root",
        str(toy_root),
        "--benchmarks",
        str(benchmark_file),
        "--corruptions",
    ]
    cli.main([*arguments, "--seed", "5", "--output", str(tmp_path / "figures")])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "figures" / "corruptions.json").read_text())
    measured = report["benchmarks"]["noise"]
    assert report["seed"] == 5 and list(report["parameters"]) == list(measured["accuracy"]) == list(CORRUPTIONS)
    assert measured["accuracy"]["occlusion"] == result.accuracy["occlusion"] and measured["clean"] == clean.accuracy
    assert f"low_resolution  {100 * measured['accuracy']['low_resolution'][0]:6.2f} (" in printed
