"""Features of the denoiser aligned with a recognizer's, and an identity loss by several recognizers."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_UNET, tiny_autoencoder
from safetensors.torch import load_file
from tiny_training import train, write_workspace

from uiface_diffusers import EmptyContext, IdentityProjector, UIFacePipeline, UIFaceUNet2DModel
from uiface_diffusers.data import FaceCache
from uiface_diffusers.denoisers import denoiser_kind
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.models.face_recognition import IResNetConfig, IResNetImageProcessor, IResNetModel
from uiface_diffusers.pictures import scale_to_unit_range
from uiface_diffusers.training.alignment import AlignedDenoiser, OwnRecognizer, Teacher, cache_features
from uiface_diffusers.training.denoising import ConditionalDenoiser, DenoisingLoss, denoising_loss, face_losses
from uiface_diffusers.training.objectives import new_sampler, training_scheduler


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, toy_root, toy_photographs):
    root = write_workspace(tmp_path_factory.mktemp("alignment"), toy_root, toy_photographs)
    for seed, dim in ((0, 16), (1, 24)):
        torch.manual_seed(seed)
        config = IResNetConfig(layers=18, width=16, embedding_dim=dim, image_size=112)
        IResNetModel(config).save_pretrained(root / f"own_{seed}")
        IResNetImageProcessor().save_pretrained(root / f"own_{seed}")
    return root


def weights(folder):
    return {
        f"{file.parent.name}/{k}": v for file in folder.glob("[!c]*/*.safetensors") for k, v in load_file(file).items()
    }


def aligned_denoiser() -> tuple[AlignedDenoiser, tuple[int, int]]:
    torch.manual_seed(0)
    unet = UIFaceUNet2DModel(**TINY_UNET)
    denoiser = ConditionalDenoiser(unet, IdentityProjector(16, 32), EmptyContext(32))
    middle, inner, grid = denoiser_kind(unet).middle(unet, 8, 8)
    return AlignedDenoiser(denoiser, middle, inner, 6).train(), grid


def test_two_faces_are_aligned_and_the_denoiser_learns_from_it():
    model, grid = aligned_denoiser()
    assert grid == (8, 8)
    latents, embeds = torch.randn(2, 2, 4, 8, 8), F.normalize(torch.randn(2, 16))
    teacher = F.normalize(torch.randn(2, 2, 64, 6), dim=-1)
    scheduler = training_scheduler(new_sampler("v_prediction"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    means = []
    for _ in range(80):
        optimizer.zero_grad()
        alignment = denoising_loss(model, scheduler, latents, embeds, 0.2, None, teacher=teacher).alignment
        alignment.mean().backward()
        means.append(alignment.mean().item())
        if len(means) == 1:
            assert model.denoiser.unet.conv_in.weight.grad.abs().sum() > 0
        optimizer.step()
    assert sum(means[-10:]) < 0.8 * sum(means[:10])


def test_the_forward_is_one_graph_and_the_prediction_is_the_denoisers():
    model, _ = aligned_denoiser()
    arguments = (torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 16), torch.tensor([True, False]))
    with torch.random.fork_rng():
        expected = model.denoiser(*arguments)
    prediction, features = torch.compile(model, backend="eager", fullgraph=True)(*arguments)
    assert features.shape == (2, 64, 6) and prediction.shape == expected.shape


def test_cached_features_are_the_teachers(workspace, toy_root):
    cache = FaceCache(workspace / "cache")
    for source in (str(workspace / "own_0"), FaceEncoder("toy", str(toy_root), det_size=160)):
        teacher = Teacher(source)
        cached = cache_features([cache], teacher, (8, 8), "cpu")
        faces = torch.stack([torch.from_numpy(face.copy()) for face in cache.shard_images(cache.shards[0])][:3])
        pixels = scale_to_unit_range(faces.permute(0, 3, 1, 2).float())
        expected = torch.stack([teacher(pixels, (8, 8)), teacher(pixels.flip(-1), (8, 8))], dim=1)
        found = cached.__getitems__([0, 1, 2])
        assert found.dtype == torch.float16 and found.shape[1:3] == (2, 64) and found.shape[3] <= 64
        assert torch.allclose(found.float(), expected, atol=1e-3)


def test_training_with_alignment_resumes_exactly(workspace):
    options = ("--alignment-weight", "0.5", "--alignment-recognizer", str(workspace / "own_0"))
    assert train(workspace, "plain", "--max-train-steps", "3").returncode == 0
    assert train(workspace, "zero", *options[2:], "--alignment-weight", "0", "--max-train-steps", "3").returncode == 0
    plain, zero = weights(workspace / "plain"), weights(workspace / "zero")
    assert len(plain) > 50 and all(torch.equal(plain[name], zero[name]) for name in plain)
    result = train(workspace, "whole", *options, "--max-train-steps", "4")
    assert result.returncode == 0, result.stderr
    again = ("--resume-from-checkpoint", "latest")
    for steps in ("2", "4"):
        result = train(workspace, "halves", *options, "--max-train-steps", steps, *again)
        assert result.returncode == 0, result.stderr
    whole, halves = weights(workspace / "whole"), weights(workspace / "halves")
    assert whole.keys() == plain.keys() == halves.keys()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert any(not torch.equal(plain[name], whole[name]) for name in plain)
    UIFacePipeline.from_pretrained(workspace / "whole")
    changed = ("--alignment-weight", "0.5", "--alignment-recognizer", str(workspace / "own_1"))
    result = train(workspace, "halves", *changed, "--max-train-steps", "5", *again)
    assert result.returncode != 0 and "alignment_recognizer: " in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--alignment-weight", "1"), "--alignment-weight needs a teacher"),
        (("--alignment-weight", "1", "--alignment-recognizer", "nowhere"), "nowhere is no folder of a recognizer"),
        (("--identity-recognizers", "nowhere"), "are beside the encoder"),
        (("--identity-recognizers", "nowhere", "--encoder-root", "packs"), "are beside the encoder"),
    ],
)
def test_what_is_missing_is_named(workspace, options, message):
    result = train(workspace, "bad", *options)
    assert result.returncode == 2 and message in result.stderr


def test_the_identity_loss_is_the_mean_over_the_recognizers(workspace, toy_root):
    torch.manual_seed(0)
    vae = tiny_autoencoder().requires_grad_(False)
    denoised, clean = torch.randn(4, 4, 8, 8, requires_grad=True), torch.randn(4, 4, 8, 8)
    loss = DenoisingLoss(torch.zeros(4), torch.zeros(4, dtype=int), torch.zeros(4, dtype=bool), denoised, clean)
    identities, encoder = F.normalize(torch.randn(4, 16)), FaceEncoder("toy", str(toy_root), det_size=160).to_torch()
    further = [OwnRecognizer(workspace / f"own_{seed}") for seed in (0, 1)]
    found, alone = [], []
    for recognizers, results in ((further, found), ((), alone)):
        torch.manual_seed(1)
        results.append(face_losses(vae, encoder, None, loss, identities, 4, further=recognizers))
    (found,), (alone,) = found, alone
    assert torch.equal(found.cosines, alone.cosines) and torch.equal(alone.identity_distances(), 1 - alone.cosines)
    expected = 1 - (found.cosines + found.further_cosines.sum(dim=0)) / 3
    assert torch.allclose(found.identity_distances(), expected, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.further_cosines.sum(), denoised)
    assert gradient.abs().sum() > 0


def test_further_recognizers_train(workspace, toy_root):
    options = ("--prediction-type", "v_prediction", "--encoder-root", str(toy_root), "--identity-weight", "0.5")
    options += ("--decoded-samples", "2", "--max-train-steps", "2")
    result = train(workspace, "further", *options, "--identity-recognizers", str(workspace / "own_0"))
    assert result.returncode == 0, result.stderr
    checkpoint = json.loads((workspace / "further" / "checkpoint-2" / "training.json").read_text())
    assert len(checkpoint["fixed"]["identity_recognizers"]) == 1
