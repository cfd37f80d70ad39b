import json
import tracemalloc
import warnings

import numpy as np
import PIL.Image
import pytest
from conftest import draw_person

from uiface_diffusers import cli
from uiface_diffusers.data.sources import open_source
from uiface_diffusers.evaluation import (
    TemplateFolder,
    load_recognizer,
    measure_identification,
    pool_templates,
    verify_templates,
)
from uiface_diffusers.evaluation.embedding import embed_source
from uiface_diffusers.evaluation.templates import (
    compare_templates,
    read_landmarks,
    read_media_list,
    read_template_pairs,
)
from uiface_diffusers.faces import FaceEncoder, align_face, load_photograph


def images_of_templates(seed=0, templates=30, dimensions=16):
    """Features of differing lengths, and numbers of templates and media, in no order; a medium has one to four images,
    and some media are in several templates."""
    generator = np.random.default_rng(seed)
    rows = []
    for template in generator.choice(1000, templates, replace=False):
        for medium in generator.choice(50, generator.integers(1, 5), replace=False):
            rows += [(template, medium)] * generator.integers(1, 5)
    numbers = generator.permutation(np.array(rows))
    features = generator.normal(size=(len(rows), dimensions)) * generator.uniform(1, 30, (len(rows), 1))
    return features.astype(np.float32), numbers[:, 0], numbers[:, 1], generator.uniform(0.5, 1, len(rows))


def brute_force_pooling(features, templates, media, scores, feature_norms):
    pooled = {}
    for template in sorted(set(templates.tolist())):
        total = 0
        for medium in set(media[templates == template].tolist()):
            images = []
            for feature, one, other, score in zip(features.astype(np.float64), templates, media, scores, strict=True):
                if (one, other) == (template, medium):
                    images.append((feature if feature_norms else feature / np.sqrt(feature @ feature)) * score)
            total = total + sum(images) / len(images)
        pooled[template] = total / np.sqrt(total @ total)
    return pooled


@pytest.mark.parametrize("feature_norms", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_pooling_by_brute_force(feature_norms, weighted):
    features, templates, media, scores = images_of_templates()
    expected = brute_force_pooling(
        features, templates, media, scores if weighted else np.ones(len(scores)), feature_norms
    )
    for image_rows in (1, 7, 10_000):
        numbers, vectors = pool_templates(
            features, templates, media, scores if weighted else None, feature_norms, image_rows=image_rows
        )
        assert numbers.tolist() == list(expected)
        assert np.allclose(vectors, list(expected.values()), atol=1e-6)


def test_rates_by_brute_force(tmp_path):
    """Lists in arcface_torch's form, written and read; ties between pairs."""
    features, templates, media, _ = images_of_templates()
    generator = np.random.default_rng(1)
    drawn = generator.choice(templates, (3200, 2))
    drawn = drawn[drawn[:, 0] != drawn[:, 1]][:3000]  # pairs come several times
    same = generator.random(3000) < 0.2
    lines = [f"{a} {b} {int(c)}" for (a, b), c in zip(drawn, same, strict=True)]
    (tmp_path / "pairs.txt").write_text("\n".join(lines) + "\n")
    files = [f"{row}.jpg" for row in range(len(templates))]
    lines = [f"{name} {template} {medium}" for name, template, medium in zip(files, templates, media, strict=True)]
    (tmp_path / "media.txt").write_text("\n".join(lines) + "\n")
    listed = read_media_list(tmp_path / "media.txt")
    assert (
        listed.files == files and np.array_equal(listed.templates, templates) and np.array_equal(listed.media, media)
    )

    numbers, vectors = pool_templates(features, *listed[1:])
    far = (0.1, 0.01, 1e-3, 1e-4)
    result = compare_templates(numbers, vectors, read_template_pairs(tmp_path / "pairs.txt", rows=137), far)
    pooled = brute_force_pooling(features, templates, media, np.ones(len(templates)), True)
    cosines = np.array([round(float(pooled[a] @ pooled[b]), 9) for a, b in drawn])
    genuine, impostor = cosines[same], cosines[~same]
    assert np.allclose(result.genuine, genuine, atol=1e-6) and np.allclose(result.impostor, impostor, atol=1e-6)
    # one of ten thousand impostors cannot be told among 2,400
    assert list(result.tar_at_far) == [0.1, 0.01, 1e-3] and len(impostor) < 10_000
    for rate, found in result.tar_at_far.items():
        best = max(np.mean(genuine > t) for t in [-2, *cosines] if np.mean(impostor > t) <= rate)
        assert found.rate == pytest.approx(best, abs=1e-6) and found.low <= found.rate <= found.high
    whole = compare_templates(numbers, vectors, read_template_pairs(tmp_path / "pairs.txt"), far)
    assert np.array_equal(whole.genuine, result.genuine) and np.array_equal(whole.impostor, result.impostor)


def test_memory_is_bounded_by_blocks():
    """The pairs' vectors at once would be 160 MB twice."""
    vectors = np.random.default_rng(0).normal(size=(1000, 100))
    numbers = np.arange(1000)

    def pairs():
        for seed in range(200):
            drawn = np.random.default_rng(seed).integers(0, 1000, (1000, 3))
            yield np.column_stack([drawn[:, :2], drawn[:, 2] % 2])

    tracemalloc.start()
    try:
        compare_templates(numbers, vectors, pairs(), far=(0.1,))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10e6


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x_face_tid_mid.txt", "1.png 1 1\n2.png 2\n", "line 2, is '2.png 2', not FILE TEMPLATE MEDIUM"),
        ("x_face_tid_mid.txt", "1.png one 1\n", "whole numbers"),
        ("x_face_tid_mid.txt", "", "lists no images"),
        ("x_face_tid_mid.txt", "1.png 1 1\n7.png 2 1\n", "1 of 2 images of .* missing, such as .*7.png"),
        ("x_template_pair_label.txt", "1 2 1\n1 3 x\n", "line 2, is '1 3 x', not TEMPLATE TEMPLATE 0/1"),
        ("x_template_pair_label.txt", "1 2 7\n", "line 1, is '1 2 7', not"),
        ("x_template_pair_label.txt", "1 2\n", "line 1, is '1 2', not"),
        ("x_template_pair_label.txt", "\n", "has no pairs"),
        ("x_template_pair_label.txt", "1 9 1\n", "template 9 of the pairs has no image"),
        ("x_template_pair_label.txt", "1 2 1\n", "1 genuine and 0 impostor pairs"),
        ("x_name_5pts_score.txt", "1.png 1 2 3\n", "not FILE X1 Y1"),
        ("x_name_5pts_score.txt", "1.png " + "1 " * 10 + "high\n", "not FILE X1 Y1"),
        ("x_name_5pts_score.txt", "1.png " + "1 " * 10 + "0.9\n", "1 images of .* are not in .*, such as 2.png"),
        ("y_face_tid_mid.txt", "", "2 lists"),
    ],
)
def test_damaged_lists_are_named(tmp_path, toy_root, name, text, message):
    for folder in ("meta", "loose_crop"):
        (tmp_path / folder).mkdir()
    for number in (1, 2):
        PIL.Image.new("RGB", (112, 112), (200, 0, 70 * number)).save(tmp_path / "loose_crop" / f"{number}.png")
    (tmp_path / "meta" / "x_face_tid_mid.txt").write_text("1.png 1 1\n2.png 2 1\n")
    (tmp_path / "meta" / "x_template_pair_label.txt").write_text("1 2 1\n1 2 0\n")
    (tmp_path / "meta" / name).write_text(text)
    arguments = ["verify", "toy", "--encoder-root", str(toy_root), "--templates", str(tmp_path), "--aligned"]
    with pytest.raises(SystemExit, match=f"(?s)uiface verify: .*{message}"), warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy warns of empty input
        cli.main(arguments)


def test_folders_of_arcface_torchs_form(tmp_path, toy_root, capsys):
    """Aligned by the listed landmarks; figures are those of the pieces."""
    colors = [(0, 255, 0), (0, 0, 255), (255, 255, 255)]
    root = tmp_path / "TOY"
    for folder in ("meta", "loose_crop"):
        (root / folder).mkdir(parents=True)
    media, landmarks = [], []
    for person, color in enumerate(colors):
        for index in range(4):
            name = f"{4 * person + index}.png"
            shade = tuple(abs(value - 40 * index) for value in color)
            draw_person(shade, ((78 + index, 80, 44),)).save(root / "loose_crop" / name)
            media.append(f"{name} {10 * person + index // 2} {index}")
            points = [(78 + index + 8 * x, 80 + 8 * y) for x, y in ((-2, -2), (2, -2), (0, 0), (-1.6, 2), (1.6, 2))]
            landmarks.append(f"{name} " + " ".join(f"{x} {y}" for x, y in points) + f" {0.9 - 0.1 * index:.1f}")
    media.append("0.png 99 7")  # in a second template
    pairs = [
        f"{10 * a + i} {10 * b + j} {int(a == b)}" for a in range(3) for b in range(3) for i, j in ((0, 1), (1, 0))
    ]
    for name, lines in (("face_tid_mid", media), ("name_5pts_score", landmarks), ("template_pair_label", pairs)):
        (root / "meta" / f"toy_{name}.txt").write_text("\n".join(lines) + "\n")
    pack = ["--encoder-root", str(toy_root), "--templates", str(root)]
    cli.main(["verify", "toy", *pack, "--output", str(tmp_path / "figures")])
    printed = capsys.readouterr().out
    assert "6 genuine and 12 impostor pairs of 7 templates" in printed and "too few impostor pairs" in printed
    report = json.loads((tmp_path / "figures" / "templates.json").read_text())
    assert (report["recognizer"], report["benchmark"], report["genuine_pairs"]) == ("toy", "TOY", 6)

    recognizer, folder = load_recognizer("toy", toy_root), TemplateFolder(root)
    result = verify_templates(recognizer, folder, far=(0.1,))
    points = read_landmarks(root / "meta" / "toy_name_5pts_score.txt")
    features, weights = [], []
    for file in folder.media.files:
        face = align_face(load_photograph(root / "loose_crop" / file), points[file].landmarks)[None]
        features.append((recognizer(face) + recognizer(face[:, :, ::-1]))[0])
        weights.append(points[file].score)
    pooled = brute_force_pooling(np.array(features), folder.media.templates, folder.media.media, weights, True)
    expected = [pooled[int(a)] @ pooled[int(b)] for a, b, label in map(str.split, pairs) if label == "1"]
    assert np.allclose(result.genuine, expected, atol=1e-6) and list(result.tar_at_far) == [0.1]
    unweighted = verify_templates(recognizer, folder, detection_scores=False, feature_norms=False)
    assert not np.allclose(result.genuine, unweighted.genuine, atol=1e-9)
    with pytest.raises(SystemExit, match="protocol of its own: leave out --groups, --corruptions"):
        cli.main(["verify", "toy", *pack, "--groups", "groups.csv", "--corruptions"])
    with pytest.raises(SystemExit, match="has no .*_face_tid_mid.txt"):
        cli.main(["verify", "toy", *pack[:2], "--templates", str(tmp_path)])


def test_people_of_lfw_are_told_by_templates_and_searches(tmp_path, assets):
    """Six people of four photographs each: two templates of two photographs, by EdgeFace."""
    lfw, packs = assets / "lfw" / "images", assets / "insightface"
    if not lfw.is_dir() or not packs.is_dir():
        pytest.skip(f"{lfw} or {packs} is missing")
    people = [folder for folder in sorted(lfw.iterdir()) if len(list(folder.iterdir())) >= 4][:6]
    media, names = [], [folder.name for folder in people]
    for folder in ("meta", "loose_crop"):
        (tmp_path / folder).mkdir()
    for number, folder in enumerate(people):
        for index, file in enumerate(sorted(folder.iterdir())[:4]):
            (tmp_path / "loose_crop" / file.name).symlink_to(file)
            media.append(f"{file.name} {2 * number + index // 2} {index}")
    pairs = [f"{2 * a} {2 * b + 1} {int(a == b)}" for a in range(6) for b in range(6)]
    for name, lines in (("face_tid_mid", media), ("template_pair_label", pairs)):
        (tmp_path / "meta" / f"lfw_{name}.txt").write_text("\n".join(lines) + "\n")
    encoder, recognizer = FaceEncoder("edgeface", str(packs)), load_recognizer("edgeface", packs)
    result = verify_templates(recognizer, TemplateFolder(tmp_path), encoder, far=(0.1,))
    assert (len(result.genuine), len(result.impostor), result.templates) == (6, 30, 12)
    assert result.tar_at_far[0.1].rate == 1 and result.genuine.min() > 0.4 > result.impostor.max()

    for part, wanted in (("gallery", names[:4]), ("probes", names)):
        for name in wanted:
            (tmp_path / part / name).mkdir(parents=True)
            file = sorted((lfw / name).iterdir())[part == "probes"]
            (tmp_path / part / name / file.name).symlink_to(file)
    parts = [embed_source(recognizer, open_source(tmp_path / part), encoder, part) for part in ("gallery", "probes")]
    searched = measure_identification(*(each for part in parts for each in (part.features, part.identities)))
    assert searched.rank_rate(1).rate == 1 and searched.tpir_at(0.5).rate == 1
    assert (len(searched.mated_scores), len(searched.non_mated_scores)) == (4, 2)
