"""Copies, strangers and twins planted in a small set, and the mathematics that finds them."""

import csv
import io
from collections import Counter

import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import complaint

import uiface_cli
from uiface_diffusers import cli
from uiface_diffusers.data.convert import FORMATS
from uiface_diffusers.data.sources import open_source
from uiface_diffusers.evaluation import cleaning
from uiface_diffusers.evaluation.cleaning import (
    clean_dataset,
    find_duplicates,
    find_strangers,
    find_twins,
    identity_means,
    other_identity_cosine,
    pairs_above,
    picture_distances,
    same_identity_cosine,
    small_picture,
)
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.hub.lineage import read_header

PEOPLE, IMAGES = 10, 6


def pattern(seed, side: int) -> PIL.Image.Image:
    """Coarse, the same on both sides: the toy recognizer, other than real ones, does not know a mirrored face."""
    half = np.random.default_rng(seed).integers(0, 256, (side, side // 2, 3), np.uint8)
    pixels = np.concatenate([half, half[:, ::-1]], axis=1)
    return PIL.Image.fromarray(pixels).resize((112, 112), PIL.Image.Resampling.BICUBIC)


def face(person: int, index: int) -> PIL.Image.Image:
    """A person's pattern with a weaker one of the image."""
    return PIL.Image.blend(pattern(person, 4), pattern((person, index + 1), 10), 0.25)


def write_set(root):
    for person in range(PEOPLE):
        (root / f"p{person}").mkdir(parents=True)
        for index in range(IMAGES):
            face(person, index).save(root / f"p{person}" / f"{index}.png")
    return root


@pytest.fixture
def planted(tmp_path):
    """A set with one of each flaw, and file -> reason and other."""
    root = write_set(tmp_path / "set")
    original = face(0, 1)
    (root / "p0" / "a_copy.png").write_bytes((root / "p0" / "1.png").read_bytes())
    original.save(root / "p0" / "encoded.jpg", quality=60)
    PIL.ImageOps.mirror(face(1, 0)).resize((96, 96)).save(root / "p1" / "mirrored.png")
    face(2, 3).resize((112, 112), PIL.Image.Resampling.BILINEAR, box=(3, 2, 109, 111)).save(root / "p2" / "cut.png")
    face(20, 0).save(root / "p3" / "nobody.png")
    face(5, 40).save(root / "p4" / "moved.png")
    (root / "twin").mkdir()
    for index in range(4):
        face(6, 50 + index).save(root / "twin" / f"{index}.png")
    (root / "p7" / "broken.png").write_bytes(b"no picture")
    return root, {
        "p0/a_copy.png": ("duplicate, byte for byte", "p0/1.png"),
        "p0/encoded.jpg": ("duplicate", "p0/1.png"),
        "p1/mirrored.png": ("duplicate", "p1/0.png"),
        "p2/cut.png": ("duplicate", "p2/3.png"),
        "p3/nobody.png": ("stranger", ""),
        "p4/moved.png": ("stranger", "p5"),
        **{f"twin/{index}.png": ("twin", "p6") for index in range(4)},
        "p7/broken.png": ("unusable: unreadable", ""),
    }


def clean(root, toy_root, *options):
    pack = ["--encoder", "toy", "--encoder-root", str(toy_root), "--det-size", "160"]
    cli.main(["clean", str(root), *pack, *map(str, options)])


def contents(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_planted_flaws_are_listed_and_left_out(planted, toy_root, tmp_path, capsys):
    root, expected = planted
    before, listing, output = contents(root), tmp_path / "list.csv", tmp_path / "cleaned"
    clean(root, toy_root, "--list", listing, "--output", output)
    with open(listing, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"]: (row["reason"], row["other"]) for row in rows} == expected
    for row in rows:
        if row["reason"].startswith("duplicate"):
            assert 0 <= float(row["number"]) <= float(row["threshold"]) < 0.3
        elif row["reason"] == "stranger":
            assert float(row["number"]) < float(row["threshold"])
    assert contents(root) == before and not list(tmp_path.glob("*.cache"))
    kept = {photograph.file for photograph in open_source(output).photographs}
    assert kept == {photograph.file for photograph in open_source(root).photographs} - expected.keys()
    printed = capsys.readouterr().out
    assert "4 twin: of identities" in printed and "2 stranger: " in printed and "1 unusable: " in printed
    assert f"60 images of 10 identities are in {output}" in printed
    (step,) = read_header(output / "README.md")["lineage"]["derived_from"]
    reasons = Counter(reason.partition(":")[0] for reason, _ in expected.values())
    assert step["taken_out"] == reasons and (step["name"], step["encoder"]) == (root.name, "toy")
    assert step["images"] == 60 + reasons.total() and step["thresholds"].keys() >= {"stranger_cosine", "twin_cosine"}


def test_thresholds_can_be_given(planted, toy_root, tmp_path):
    root, expected = planted
    listing = tmp_path / "list.parquet"
    given = [
        "--stranger-cosine",
        "-1",
        "--twin-cosine",
        "1",
        "--duplicate-distance",
        "0",
        "--duplicate-cosine",
        "0.99",
    ]
    clean(root, toy_root, "--list", listing, *given)
    rows = pq.read_table(listing).to_pylist()
    reasons = {row["file"]: row["reason"] for row in rows}
    assert (
        reasons["p0/a_copy.png"] == "duplicate, byte for byte" and reasons["p7/broken.png"] == "unusable: unreadable"
    )
    assert not {"stranger", "twin"} & set(reasons.values())
    assert [row["threshold"] for row in rows if row["file"] == "p0/a_copy.png"] == [0]


class CountingEncoder(FaceEncoder):
    embedded = 0

    def __call__(self, faces):
        self.embedded += len(faces)
        return super().__call__(faces)


def test_what_was_embedded_is_kept_until_the_list_is_written(planted, toy_root, tmp_path):
    root, expected = planted
    encoder = CountingEncoder("toy", str(toy_root), det_size=160)

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        clean_dataset(root, encoder, tmp_path / "list.csv", log=interrupt)
    first, encoder.embedded = encoder.embedded, 0
    assert first >= 70 and (tmp_path / "list.csv.cache").is_dir()
    report = clean_dataset(root, encoder, tmp_path / "list.csv")
    assert encoder.embedded == 0 and not (tmp_path / "list.csv.cache").exists()
    assert {finding.file for finding in report.findings} == expected.keys()
    assert (report.images, report.identities, report.kept_images, report.kept_identities) == (71, 11, 60, 10)


def test_what_cannot_be_measured_is_named_first(toy_root, tmp_path):
    root = tmp_path / "set"
    (root / "a").mkdir(parents=True)
    face(0, 0).save(root / "a" / "0.png")
    face(0, 1).save(root / "a" / "1.png")
    options = ["--encoder", "toy", "--encoder-root", toy_root, "--list", tmp_path / "list.csv"]
    assert "a single identity, so no strangers" in complaint("clean", root, *options)
    (root / "b").mkdir()
    (root / "a" / "1.png").rename(root / "b" / "1.png")
    assert "no identity has two images" in complaint("clean", root, *options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "is not empty: choose another folder" in complaint("clean", root, *options, "--output", tmp_path / "full")
    assert not (tmp_path / "list.csv").exists() and not list(tmp_path.glob("*.cache"))


def people(number: int, images: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(number, 1, 64, generator=generator)
    faces = centers + 0.5 * torch.randn(number, images, 64, generator=generator)
    return F.normalize(faces.flatten(0, 1), dim=1), torch.arange(number).repeat_interleave(images)


def test_thresholds_by_brute_force():
    embeddings, labels = people(20, 8)
    cosines, own = embeddings @ embeddings.T, labels[:, None] == labels
    scores = torch.stack([cosines[:, labels == person].mean(dim=1) for person in range(20)], dim=1)
    others = scores[labels[:, None] != torch.arange(20)]
    threshold = other_identity_cosine(embeddings, labels, share=0.05)
    assert (others > threshold).float().mean() <= 0.05 < (others > threshold - 4e-4).float().mean() + 1 / len(others)
    within = [cosines[own & (labels == person)][:].sum() - 8 for person in range(20)]
    expected = np.quantile([float(total) / 56 for total in within], 0.05)
    means, counts = identity_means(embeddings, labels, 20)
    assert same_identity_cosine(means, counts, -1, share=0.05) == pytest.approx(expected, abs=1e-5)
    assert same_identity_cosine(means, counts, 0.99) == 0.99


def test_strangers_do_not_make_strangers_of_the_others():
    embeddings, labels = people(5, 4)
    embeddings[1], embeddings[2] = embeddings[9], embeddings[14]  # two of the four images of the first person
    assert set(find_strangers(embeddings, labels, 0.3)) in ({1, 2}, {0, 3}, {0, 2, 3}, {1, 2, 3})
    embeddings, labels = people(5, 6)
    embeddings[[1, 2]] = embeddings[[9, 20]]
    found = find_strangers(embeddings, labels, 0.3)
    assert set(found) == {1, 2} and all(score < 0.3 for score in found.values())
    # of two that are not of one person, the first stays
    embeddings, labels = people(2, 2)
    embeddings[1] = people(1, 1, seed=5)[0][0]
    assert set(find_strangers(embeddings, labels, 0.3)) == {1}


def test_of_twins_the_larger_stays():
    """One person under three names, with 6, 4 and 6 images."""
    embeddings, labels = people(4, 16)
    embeddings, labels = embeddings[:58], labels[:58].clone()
    labels[6:10], labels[10:16] = 4, 5
    means, counts = identity_means(embeddings, labels, 6)
    cosines = embeddings @ embeddings.T
    found = find_twins(means, counts, 0.4)
    assert {label: other for label, (_, other) in found.items()} == {4: 0, 5: 0}
    assert found[4][0] == pytest.approx(float(cosines[labels == 4][:, labels == 0].mean()), abs=1e-5)


def test_a_large_set_is_compared_in_blocks(monkeypatch):
    """Blocks without any pair included."""
    embeddings, _ = people(40, 1)
    embeddings[39] = embeddings[0]
    whole = [(pairs.tolist(), scores) for pairs, scores in pairs_above(embeddings, 0.9)]
    monkeypatch.setattr(cleaning, "ROWS", 7)
    (block,) = pairs_above(embeddings, 0.9)
    assert [block[0].tolist()] == [pairs for pairs, _ in whole] == [[[0, 39]]]
    pictures = torch.rand(40, cleaning.SIDE, cleaning.SIDE, generator=torch.Generator().manual_seed(0))
    kept = torch.ones(40, dtype=torch.bool)
    assert find_duplicates(embeddings, pictures, kept, 0.9, 0.05) == {}
    pictures[39] = pictures[0]
    assert find_duplicates(embeddings, pictures, kept, 0.9, 0.05) == {39: (pytest.approx(0, abs=1e-5), 0)}
    assert find_duplicates(embeddings, pictures, kept, 1.1, 0.05) == {}


def test_distances_of_pictures():
    original, other = face(0, 0), face(1, 1)
    buffer = io.BytesIO()
    original.save(buffer, "jpeg", quality=50)
    copies = {
        "same": original,
        "mirrored": PIL.ImageOps.mirror(original),
        "brighter": original.point(lambda value: value // 2 + 60),
        "encoded": PIL.Image.open(buffer),
        "cut": original.resize((112, 112), PIL.Image.Resampling.BILINEAR, box=(5, 1, 110, 108)),
        "other": other,
        "uniform": PIL.Image.new("RGB", (112, 112), (9, 9, 9)),
    }
    second = torch.stack([small_picture(copy) for copy in copies.values()]).float()
    first = small_picture(original).float().expand_as(second)
    for distances in (picture_distances(first, second), picture_distances(second, first)):
        found = dict(zip(copies, distances.tolist(), strict=True))
        assert found["same"] < 1e-5 and found["mirrored"] < 1e-5 and found["brighter"] < 1e-3
        assert found["encoded"] < 0.02 and found["cut"] < 0.1 < 0.4 < found["other"] and found["uniform"] > 0.9
    assert picture_distances(second[-1:], second[-1:]) == 0


def test_equal_files_are_told_though_rounding_keeps_them_apart(toy_root, tmp_path):
    root = write_set(tmp_path / "set")
    for person in range(PEOPLE):
        (root / f"p{person}" / "copy.png").write_bytes((root / f"p{person}" / "3.png").read_bytes())
    report = clean_dataset(root, FaceEncoder("toy", toy_root, det_size=160), tmp_path / "list.csv")
    reasons = {finding.file: finding.reason for finding in report.findings}
    # `3.png` comes before `copy.png`, which is the copy
    assert reasons == {f"p{person}/copy.png": "duplicate, byte for byte" for person in range(PEOPLE)}


@pytest.mark.parametrize("command", ["clean", "convert"])
def test_every_form_can_be_chosen(command):
    (commands,) = (action for action in uiface_cli.build_parser()._actions if isinstance(action.choices, dict))
    (option,) = (each for each in commands.choices[command]._actions if each.dest == "format")
    assert tuple(option.choices) == FORMATS
