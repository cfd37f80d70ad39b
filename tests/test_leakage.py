import itertools

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import draw_person

from uiface_diffusers import IdentityBank, cli
from uiface_diffusers.data import prepare_faces
from uiface_diffusers.evaluation import measure_leakage
from uiface_diffusers.evaluation.leakage import impostor_thresholds
from uiface_diffusers.faces import FaceEncoder


def real_bank(people: int = 60, photographs: int = 20) -> IdentityBank:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(people, 1, 32, generator=generator)
    faces = centers + 0.7 * torch.randn(people, photographs, 32, generator=generator)
    return IdentityBank(
        F.normalize(faces.flatten(0, 1)), "toy", [f"p{i}" for i in range(people) for _ in range(photographs)]
    )


def test_thresholds_by_brute_force():
    bank = real_bank()
    similarity = bank.embeddings @ bank.embeddings.T
    impostors = sorted(
        (
            float(similarity[i, j])
            for i, j in itertools.combinations(range(len(bank)), 2)
            if bank.names[i] != bank.names[j]
        ),
        reverse=True,
    )
    thresholds, pairs, nearest = impostor_thresholds(bank)
    assert pairs == len(impostors) == 60 * 59 // 2 * 400
    for rate, threshold in thresholds.items():
        above = sum(value > threshold for value in impostors)
        nearly = sum(value > threshold - 2e-5 for value in impostors)
        assert above <= int(rate * pairs) <= nearly
    same = torch.tensor([[a == b for b in bank.names] for a in bank.names])
    assert torch.allclose(nearest, similarity.masked_fill(same, -1).amax(dim=1), atol=1e-6)


def test_planted_people_are_found():
    """A synthetic identity that is a real one, one image of another that is, and strangers."""
    real, generator = real_bank(), torch.Generator().manual_seed(1)
    strangers = F.normalize(torch.randn(40, 32, generator=generator))
    synthetic = strangers.clone()
    synthetic[:10] = F.normalize(real.embeddings[100:110] + 0.05 * torch.randn(10, 32, generator=generator))
    synthetic[15] = real.embeddings[500]
    names = [f"s{i // 10}" for i in range(40)]
    report = measure_leakage(IdentityBank(synthetic, "toy", names), real)
    cosines = synthetic @ real.embeddings.T
    assert torch.allclose(report.image_cosines, cosines.amax(dim=1), atol=1e-5)
    assert torch.equal(report.image_nearest, cosines.argmax(dim=1)) and report.image_nearest[15] == 500
    means = F.normalize(synthetic.unflatten(0, (4, 10)).mean(dim=1))
    expected = (means @ real.embeddings.T).amax(dim=1)
    assert list(report.identity_cosines) == ["s0", "s1", "s2", "s3"]
    assert torch.allclose(torch.tensor(list(report.identity_cosines.values())), expected, atol=1e-5)
    for rate, threshold in report.thresholds.items():
        assert report.image_shares[rate] == pytest.approx((cosines.amax(dim=1) > threshold).float().mean().item())
        assert report.image_shares[rate] >= 11 / 40
        assert report.identity_shares[rate] == pytest.approx((expected > threshold).float().mean().item())


def test_what_cannot_be_compared_is_named():
    with pytest.raises(ValueError, match="from encoder `a`, the real one from encoder `b`: use one model pack"):
        measure_leakage(IdentityBank(torch.eye(3), "a"), IdentityBank(torch.eye(3), "b"))
    with pytest.raises(ValueError, match="of one identity"):
        measure_leakage(IdentityBank(torch.eye(3)), IdentityBank(torch.eye(3), names=["x"] * 3))


def test_the_command_shows_the_worst_pairs(toy_root, tmp_path, capsys):
    """A data set with a copy of a training face."""
    for person, color in (("a", (0, 255, 0)), ("b", (0, 0, 255)), ("c", (255, 255, 255))):
        (tmp_path / "real" / person).mkdir(parents=True)
        draw_person(color, ((56, 56, 44),), size=(112, 112)).save(tmp_path / "real" / person / "0.png")
        (tmp_path / "set" / f"s{person}").mkdir(parents=True)
        strange = PIL.Image.fromarray(np.random.default_rng(ord(person)).integers(0, 256, (112, 112, 3), np.uint8))
        strange.save(tmp_path / "set" / f"s{person}" / "0000.png")
    copy = PIL.Image.open(tmp_path / "real" / "b" / "0.png")
    copy.save(tmp_path / "set" / "sc" / "0000.png")
    copy.resize((100, 112)).save(tmp_path / "set" / "sc" / "0001.png")
    (tmp_path / "set" / "sc" / "notes.txt").touch()
    pack = ["--encoder", "toy", "--encoder-root", str(toy_root), "--det-size", "160"]
    encoder = FaceEncoder("toy", str(toy_root), det_size=160)
    prepare_faces(tmp_path / "real", tmp_path / "cache", encoder, image_size=112, aligned=True)
    plot = tmp_path / "audit.png"
    arguments = ["--against", str(tmp_path / "cache"), "--plot", str(plot), "--worst", "2"]
    cli.main(["audit", str(tmp_path / "set"), *arguments, *pack])
    printed = capsys.readouterr().out
    assert "3 images of 3 identities against 3 real embeddings" in printed
    assert "left out: sc/0001.png: not aligned: 100x112 is not square" in printed
    assert "left out: 1 not an image by its suffix: sc/notes.txt" in printed
    assert not list(tmp_path.glob("*.cache"))
    assert "sc/0000.png: 1.000 to b" in printed and "33.33 % of the images" in printed
    grid = np.asarray(PIL.Image.open(plot))
    assert grid.shape == (224, 224, 3)
    assert np.array_equal(grid[:112, :112], np.asarray(copy)) and np.array_equal(grid[:112, 112:], np.asarray(copy))
    with pytest.raises(SystemExit, match="`worst` has to be positive but is 0"):
        cli.main(["audit", str(tmp_path / "set"), *arguments[:-1], "0", *pack])
