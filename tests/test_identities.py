import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import complaint, draw_person
from safetensors.torch import save_file

from uiface_diffusers import IdentityBank, UIFacePipeline, cli
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.generation import make_identities
from uiface_diffusers.identities import inspect_bank, largest_cosines


def unit(number: int, dimension: int = 16, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(number, dimension, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module")
def encoder(toy_root):
    return FaceEncoder("toy", str(toy_root), det_size=128, det_thresh=0.0)


def test_identities_are_made_from_the_model_and_go_on(tiny_pipeline, encoder, tmp_path):
    """Against the same by hand; the toy detector finds a face in anything at a threshold of 0."""
    exclude = IdentityBank(unit(3), "toy")
    options = {"max_similarity": 0.985, "batch_size": 4, "num_inference_steps": 2}
    report = make_identities(tiny_pipeline, encoder, 6, tmp_path / "bank.safetensors", [exclude], **options)
    bank = IdentityBank.load(tmp_path / "bank.safetensors")
    assert len(bank) == report["kept"] == 6 and bank.identity_encoder == "toy"
    assert (bank.embeddings @ bank.embeddings.T - torch.eye(6)).max() < 0.985
    assert (bank.embeddings @ exclude.embeddings.T).max() < 0.985
    made = sorted((tmp_path / "bank.safetensors.candidates").glob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in made]
    # more of them: the candidates that are there are not made again, and the first six stay
    options |= {"batch_size": np.int64(4), "num_inference_steps": np.int64(2)}
    make_identities(tiny_pipeline, encoder, 8, tmp_path / "bank.safetensors", [exclude], **options)
    assert [path.stat().st_mtime_ns for path in made] == times
    assert torch.equal(IdentityBank.load(tmp_path / "bank.safetensors").embeddings[:6], bank.embeddings)
    with pytest.raises(ValueError, match="begun with other settings .seed"):
        make_identities(tiny_pipeline, encoder, 8, tmp_path / "bank.safetensors", [exclude], seed=1, **options)


def test_identities_go_on_with_what_the_dial_was(tiny_pipeline, encoder, tmp_path):
    """A curve that is measured again has the same model: the settings keep the call's arguments, not the dial's."""
    measured = {"genuine_cosine": 0.3, "eer": 0.1, "rows_per_image": 2.0, "boundary": "adaptive"}
    points = [
        {"guidance_scale": scale, "latest_boundary": 300, "identity_cosine": cosine, "diversity": 1 - cosine}
        for scale, cosine in ((1.5, 0.2), (3.0, 0.6))
    ]
    dial = {"points": [point | measured for point in points], "encoder": "toy", "encoder_fingerprint": None}
    dial |= {"num_inference_steps": 2, "diversity_measure": "genuine_distance"}
    options = {"max_similarity": 1.0, "batch_size": 2, "num_inference_steps": 2, "diversity": 0.0}
    pipe = UIFacePipeline.from_pipe(tiny_pipeline, dial=dial)
    make_identities(pipe, encoder, 2, tmp_path / "bank.safetensors", **options)
    dial["points"][1]["guidance_scale"] = 4.0
    again = UIFacePipeline.from_pipe(tiny_pipeline, dial=dial)
    with pytest.raises(ValueError, match="begun with other settings .sampling.*'guidance_scale': 3.0"):
        make_identities(again, encoder, 2, tmp_path / "bank.safetensors", **options)


def test_too_few_identities_are_saved_and_reported(tiny_pipeline, encoder, tmp_path):
    options = {"max_similarity": -0.9, "max_candidates": 8, "num_inference_steps": 2}
    with pytest.raises(ValueError, match="only 1 of 5 identities were found .*'near a kept identity': "):
        make_identities(tiny_pipeline, encoder, 5, tmp_path / "bank.safetensors", **options)
    assert len(IdentityBank.load(tmp_path / "bank.safetensors")) == 1


def test_banks_of_another_encoder_are_not_compared(tiny_pipeline, encoder, tmp_path):
    with pytest.raises(ValueError, match="an excluded bank comes from encoder `other`"):
        make_identities(tiny_pipeline, encoder, 5, tmp_path / "bank", [IdentityBank(unit(3), "other")])
    assert not list(tmp_path.iterdir())


def test_largest_cosines_by_brute_force():
    embeddings, known = unit(1500, 8), unit(20_000, 8, seed=1)
    cosines, positions = largest_cosines(embeddings, known)
    similarity = embeddings @ known.T
    assert torch.equal(positions, similarity.argmax(dim=1)) and torch.allclose(cosines, similarity.amax(dim=1))
    assert largest_cosines(embeddings[:2], known[:0])[0].tolist() == [-1, -1]


def test_inspection_finds_duplicates_and_the_nearest():
    embeddings = unit(1100, 64)
    embeddings[1050] = embeddings[3]
    embeddings[7] = F.normalize(embeddings[8] + 0.05 * embeddings[9], dim=0)
    report = inspect_bank(IdentityBank(embeddings), IdentityBank(embeddings[[20, 10]], names=["x", "y"]))
    similarity = embeddings @ embeddings.T - 2 * torch.eye(1100)
    assert torch.allclose(report.nearest_other, similarity.amax(dim=1), atol=1e-6)
    assert [(first, second) for first, second, _ in report.duplicates] == [("000003", "001050"), ("000007", "000008")]
    assert (
        report.nearest_known.argmax() in (10, 20) and report.known_names[10] == "y" and report.known_names[20] == "x"
    )


def test_commands(toy_root, tmp_path, capsys):
    """Images of three people, twice the same one; perturbed and inspected."""
    source = tmp_path / "photos" / "a"
    source.mkdir(parents=True)
    for number, color in enumerate(((0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 255, 0))):
        draw_person(color).save(source / f"{number}.png")
    PIL.Image.new("RGB", (160, 160)).save(source / "nobody.png")
    bank = tmp_path / "bank.safetensors"
    pack = ["--encoder", "toy", "--encoder-root", str(toy_root), "--det-size", "160"]
    make = ["identities", "make", "--from-images", str(tmp_path / "photos"), *pack, "--number", "9"]
    cli.main([*make, "--output", str(bank), "--max-similarity", "0.99999"])
    assert "candidates 4, kept 3" in capsys.readouterr().out
    assert IdentityBank.load(bank).names == ["a_0.png", "a_1.png", "a_2.png"]

    cli.main(["identities", "perturb", str(bank), "--cosine", "0.7", "0.8", "--output", str(tmp_path / "turned")])
    turned = IdentityBank.load(tmp_path / "turned")
    cosines = (turned.embeddings * IdentityBank.load(bank).embeddings).sum(dim=1)
    assert turned.identity_encoder == "toy" and ((cosines >= 0.7) & (cosines <= 0.8)).all()

    plot = tmp_path / "histogram.png"
    cli.main(["identities", "inspect", str(tmp_path / "turned"), "--against", str(bank), "--plot", str(plot)])
    printed = capsys.readouterr().out
    assert "3 identities of `toy`, 16-d" in printed and "to a_" in printed and "#" in printed
    assert PIL.Image.open(plot).size[0] > 100

    known = tmp_path / "known.safetensors"
    IdentityBank(unit(60), "toy").save(known)
    make = ["identities", "make", "--random", "--exclude", str(known), "--number", "5", "--max-similarity", "0.9"]
    cli.main([*make, "--output", str(tmp_path / "random")])
    assert len(IdentityBank.load(tmp_path / "random")) == 5


def test_a_mistake_is_named(tmp_path):
    assert "nothing" in complaint("identities", "inspect", tmp_path / "nothing")


def test_an_embedding_without_direction_is_named(tmp_path):
    for value in (float("nan"), float("inf"), 0.0):
        embeddings = unit(5)
        embeddings[3] *= value
        with pytest.raises(ValueError, match=r"1 of 5 embeddings are zero or not finite, as that of `d` in row 3"):
            IdentityBank(embeddings, "toy", list("abcde"))
    save_file({"embeddings": torch.zeros(2, 16)}, tmp_path / "bank.safetensors")
    with pytest.raises(ValueError, match="2 of 2 embeddings"):
        IdentityBank.load(tmp_path / "bank.safetensors")
