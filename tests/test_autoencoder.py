import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from conftest import ALEXNET, REPOSITORY, Outcome, run_script
from diffusers import AutoencoderKL, AutoencoderTiny, AutoModel
from processes import Running
from safetensors.torch import load_file, save_file

from uiface_diffusers.data import FaceCache, prepare_faces
from uiface_diffusers.evaluation import load_lpips, reconstruction_quality
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.latents import decode_latents, encode_images
from uiface_diffusers.training import autoencoding

SCRIPT = REPOSITORY / "training" / "train_autoencoder.py"
sys.path.insert(0, str(SCRIPT.parent))
import train_autoencoder as script  # noqa: E402

TWO = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
TWO |= {"block_out_channels": [8, 16], "norm_num_groups": 4, "latent_channels": 4, "sample_size": 64}
MODELS = {
    "AutoencoderTiny": {
        "encoder_block_out_channels": [16, 16],
        "decoder_block_out_channels": [16, 16],
        "num_encoder_blocks": [1, 1],
        "num_decoder_blocks": [1, 1],
    },
    "AutoencoderKL": {**TWO, "mid_block_add_attention": False},
    "VQModel": {**TWO, "num_vq_embeddings": 16},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, toy_root, toy_photographs, backbone):
    root = tmp_path_factory.mktemp("autoencoder")
    encoder = FaceEncoder("toy", str(toy_root), det_size=160)
    prepare_faces(toy_photographs, root / "cache", encoder, image_size=64)
    recipe = {
        "train_data": [str(root / "cache")],
        "autoencoder": {"_class_name": "AutoencoderTiny", **MODELS["AutoencoderTiny"]},
        "lpips_backbone": str(backbone),
        "identity_weight": 0.5,
        "identity_encoder": "toy",
        "encoder_root": str(toy_root),
        "train_batch_size": 4,
        "max_train_steps": 30,
        "learning_rate": 3e-3,
        "checkpointing_steps": 6,
        "validation_steps": 0,
        "report_to": "none",
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def options_of(workspace: Path, output: str, *options: str) -> list[str]:
    return ["--config", str(workspace / "recipe.yaml"), "--output-dir", str(workspace / output), *options]


def train(workspace: Path, output: str, *options: str) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", workspace / "datasets")
        return run_script(script.main, options_of(workspace, output, *options))


def pictures(workspace: Path) -> torch.Tensor:
    cache = FaceCache(workspace / "cache")
    return torch.from_numpy(np.stack(list(cache.shard_images(cache.shards[0])))).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def uninterrupted(workspace) -> Path:
    result = train(workspace, "whole", "--validation-steps", "30")
    assert result.returncode == 0, result.stderr
    return workspace / "whole"


def test_learns_to_reconstruct_and_measures_its_latents(uninterrupted, workspace):
    vae = AutoModel.from_pretrained(str(uninterrupted)).eval()
    pixels = pictures(workspace)
    before = AutoModel.from_config(vae.config).eval()
    learned, untrained = (reconstruction_quality(model, pixels).figures["l1"] for model in (vae, before))
    assert learned < 0.5 * untrained
    # the latents that a denoiser sees have mean 0 and deviation 1
    latents = encode_images(vae, pixels.float() / 127.5 - 1)
    assert abs(latents.mean()) < 1e-3 and abs(latents.std() - 1) < 1e-3
    decoded = decode_latents(vae, latents)
    assert (decoded - vae.decode(vae.encode(pixels.float() / 127.5 - 1).latents).sample).abs().max() < 1e-4
    assert (uninterrupted / "validation" / "step-0000030.png").exists()


def test_sigkill_and_resume_gives_the_same_parameters(uninterrupted, workspace):
    options = options_of(workspace, "killed", "--scale-equivariance-probability", "0")
    Running("train_autoencoder", options, HF_DATASETS_CACHE=str(workspace / "datasets")).kill_at("| 15/30")
    assert not (workspace / "killed" / "config.json").exists()
    options = ("--resume-from-checkpoint", "latest", "--dataloader-num-workers", "2")
    result = train(workspace, "killed", *options)
    assert result.returncode == 0 and "resumed from" in result.stderr, result.stderr
    file = "diffusion_pytorch_model.safetensors"
    first, second = load_file(uninterrupted / file), load_file(workspace / "killed" / file)
    assert all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


@pytest.mark.parametrize("name", ["AutoencoderKL", "VQModel"])
def test_trains_diffusers_other_autoencoders(workspace, name):
    model = json.dumps({"_class_name": name, **MODELS[name]})
    options = ("--autoencoder", model, "--max-train-steps", "3", "--scale-equivariance-probability", "0.5")
    result = train(workspace, name, *options)
    assert result.returncode == 0, result.stderr
    vae = AutoModel.from_pretrained(str(workspace / name))
    assert type(vae).__name__ == name
    latents = encode_images(vae, pictures(workspace).float() / 127.5 - 1)
    assert latents.shape == (24, 4, 32, 32) and 0.8 < latents.std() < 1.3


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--lr-scheduler", "cosine_warm_restarts"), "lr_scheduler: cosine then, cosine_warm_restarts now"),
        (("--lr-warmup-steps", "3"), "lr_warmup_steps: 0 then, 3 now"),
        (("--freeze-encoder",), "freeze_encoder: False then, True now"),
    ],
)
def test_other_settings_are_refused_on_resume(uninterrupted, workspace, option, message):
    result = train(workspace, "whole", "--resume-from-checkpoint", "latest", *option)
    assert result.returncode != 0 and message in result.stderr


def test_a_frozen_encoder_keeps_the_latents(uninterrupted, workspace):
    result = train(
        workspace,
        "decoder",
        "--init-from",
        str(uninterrupted),
        "--freeze-encoder",
        "--autoencoder",
        "null",
        "--max-train-steps",
        "3",
    )
    assert result.returncode == 0, result.stderr
    before, after = (
        AutoModel.from_pretrained(str(uninterrupted)),
        AutoModel.from_pretrained(str(workspace / "decoder")),
    )
    pixels = pictures(workspace).float() / 127.5 - 1
    assert torch.allclose(encode_images(before, pixels), encode_images(after, pixels), atol=1e-5)
    changed = [
        name
        for name, value in before.decoder.state_dict().items()
        if not after.decoder.state_dict()[name].equal(value)
    ]
    assert len(changed) > 5


def test_the_terms_of_the_loss(workspace, backbone, toy_root):
    """Against the same written out by hand."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(MODELS["AutoencoderKL"])
    pixels = pictures(workspace)[:4].float() / 127.5 - 1
    perceptual = load_lpips("alex", backbone)
    recognizer = FaceEncoder("toy", str(toy_root), det_size=160).to_torch()
    weights = ("--lpips-weight", "2", "--identity-weight", "3")
    args = script.parse_args(["--config", str(workspace / "recipe.yaml"), "--output-dir", "x", *weights])
    for halve in (False, True):
        torch.manual_seed(1)
        reconstruction, regularization = autoencoding.Reconstruction(vae)(pixels, halve)
        torch.manual_seed(1)
        posterior = vae.encode(pixels).latent_dist
        z = posterior.mean + posterior.std * torch.randn(4, 4, 32, 32)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        target = F.interpolate(pixels, (32, 32), mode="area") if halve else pixels
        z = F.interpolate(z, (16, 16), mode="area") if halve else z
        y = vae.decode(z).sample
        judge = None if halve else recognizer
        terms = script.reconstruction_terms(reconstruction, target, perceptual, judge, args)
        assert torch.allclose(regularization, kl, rtol=1e-4)
        expected = {"l1": (y - target).abs().mean()}
        expected["lpips"] = 2 * lpips_by_hand(perceptual, backbone, target, y).mean()
        if not halve:
            cosine = (recognizer(y) * recognizer(pixels)).sum(dim=1)
            expected["identity"] = 3 * (1 - cosine).mean()
        assert terms.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(terms[name], value, rtol=1e-4, atol=1e-5), name


def test_facial_features_weigh_more(workspace, backbone):
    """The same error costs more on an eye than in a corner, in L1 and in LPIPS; their weights have mean 1."""
    args = script.parse_args(options_of(workspace, "x", "--facial-features", "--identity-weight", "0"))
    perceptual = load_lpips("alex", backbone)
    perceptual.spatial = True
    target, cost = torch.zeros(1, 3, 112, 112), {}
    for place, (x, y) in {"eye": (38, 51), "corner": (8, 8)}.items():
        wrong = target.clone()
        wrong[:, :, y - 3 : y + 3, x - 3 : x + 3] = 1
        cost[place] = script.reconstruction_terms(wrong, target, perceptual, None, args)
    for name in ("l1", "lpips"):
        assert cost["eye"][name] > 2 * cost["corner"][name], name
    everywhere = script.reconstruction_terms(target + 0.5, target, None, None, args)["l1"]
    assert everywhere.item() == pytest.approx(0.5, rel=1e-4)


def test_latent_noise_reaches_the_decoder_only():
    torch.manual_seed(0)
    vae = AutoencoderTiny.from_config(MODELS["AutoencoderTiny"]).eval()
    pixels, outcome = torch.rand(2, 3, 16, 16) * 2 - 1, {}
    for noise in (0.0, 0.1):
        torch.manual_seed(1)
        outcome[noise] = autoencoding.Reconstruction(vae, latent_noise=noise)(pixels)
    torch.manual_seed(1)
    latents = vae.encode(pixels).latents
    expected = vae.decode(latents + 0.1 * torch.randn_like(latents)).sample
    assert torch.equal(outcome[0.1][0], expected) and not torch.equal(outcome[0.0][0], expected)
    assert torch.equal(outcome[0.0][1], outcome[0.1][1])


def test_the_discriminator_tells_photographs_from_blurred_ones():
    """A few steps of its own loss; the hinge loss is 1 for a discriminator that knows nothing."""
    torch.manual_seed(0)
    discriminator = autoencoding.PatchDiscriminator((16, 32))
    assert autoencoding.hinge_loss(lambda x: x.new_zeros(len(x), 1, 2, 2), *torch.zeros(2, 4, 3, 8, 8)) == 1
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-2)
    for _ in range(30):
        real = torch.rand(8, 3, 32, 32) * 2 - 1
        loss = autoencoding.hinge_loss(discriminator, real, F.avg_pool2d(real, 5, 1, 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real = torch.rand(8, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert discriminator(real).mean() > discriminator(F.avg_pool2d(real, 5, 1, 2)).mean() + 0.5


def test_adversarial_training_resumes(workspace):
    """With a discriminator from step 3 on; the second half in a process of its own gives the same parameters."""
    options = ("--adversarial-weight", "0.1", "--adversarial-start", "3", "--identity-weight", "0")
    options += ("--latent-noise", "0.05", "--facial-features", "--report-to", "tensorboard", "--logging-steps", "2")
    for steps in ("6", "12"):
        resume = ("--max-train-steps", steps, "--resume-from-checkpoint", "latest", "--lr-scheduler", "constant")
        result = train(workspace, "adversarial_halves", *options, *resume)
        assert result.returncode == 0, result.stderr
    result = train(workspace, "adversarial", *options, "--max-train-steps", "12", "--lr-scheduler", "constant")
    assert result.returncode == 0, result.stderr
    file = "diffusion_pytorch_model.safetensors"
    first, second = (load_file(workspace / name / file) for name in ("adversarial_halves", "adversarial"))
    assert all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(workspace / "adversarial" / "logs" / "train_autoencoder"))
    events.Reload()
    assert events.Scalars("discriminator")[0].step > 3
    assert {"l1", "lpips", "adversarial"} <= set(events.Tags()["scalars"])


def lpips_by_hand(perceptual, backbone, first, second) -> torch.Tensor:
    """Zhang et al. 2018: unit-normalized features, squared differences, learned weights, spatial means."""
    weights = load_file(backbone)
    mean, deviation = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    heads = [head.model[-1].weight.flatten() for head in perceptual.lins]
    features = []
    for x in (first, second):
        x, row = (x - mean[:, None, None]) / deviation[:, None, None], []
        for layer, (stride, padding) in zip(ALEXNET, ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1)), strict=True):
            x = F.max_pool2d(x, 3, 2) if layer in (3, 6) else x
            bias = weights[f"features.{layer}.bias"]
            x = F.relu(F.conv2d(x, weights[f"features.{layer}.weight"], bias, stride=stride, padding=padding))
            row.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        features.append(row)
    total = 0
    for a, b, head in zip(*features, heads, strict=True):
        total = total + ((a - b).square() * head[:, None, None]).sum(dim=1).mean(dim=(1, 2))
    return total


def test_the_log_leaves_out_steps_that_are_not_finite():
    log, accelerator = autoencoding.TermsLog(torch.device("cpu")), Accelerator(cpu=True)
    for l1, identity in ((1.0, 4.0), (float("nan"), 8.0), (3.0, None)):
        terms = {"l1": torch.tensor(l1)} | ({} if identity is None else {"identity": torch.tensor(identity)})
        log.add(sum(terms.values()), terms)
    assert log.take(accelerator) == ({"l1": 2.0, "identity": 4.0}, pytest.approx(2 / 3))
    log.add(torch.tensor(float("inf")), {"l1": torch.tensor(float("inf"))})
    assert log.take(accelerator) == ({}, 0.0)


def test_the_identity_loss_takes_any_onnx_recognizer(toy_root):
    """A file on its own is the recognizer of the pack that it is in."""
    (file,) = toy_root.glob("models/toy/recognizer.onnx")
    faces = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    alone, of_pack = (autoencoding.load_differentiable(name, str(toy_root)) for name in (str(file), "toy"))
    assert torch.equal(alone(faces), of_pack(faces))


def test_a_wrong_backbone_is_named(tmp_path, backbone):
    tensors = load_file(backbone)
    del tensors["features.6.bias"]
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="half.safetensors is no backbone of `alex`: `features.6.bias`"):
        load_lpips("alex", tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="`network`.*'resnet'"):
        load_lpips("resnet", backbone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--autoencoder", '{"_class_name": "UNet2DModel"}'), "`_class_name` of --autoencoder"),
        (("--init-from", "somewhere"), "give one of --autoencoder and --init-from"),
        (("--train-batch-size", "25"), "24 faces do not fill"),
        (("--train-data", "nowhere"), "no cache of prepared faces"),
    ],
)
def test_bad_input_is_named(workspace, options, message):
    result = train(workspace, "bad", *options)
    assert result.returncode != 0 and message in result.stderr
