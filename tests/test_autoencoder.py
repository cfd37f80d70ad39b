import json
import os
import signal
import subprocess
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
from diffusers import AutoencoderKL, AutoModel
from safetensors.torch import load_file, save_file

from uiface_diffusers.data import FaceCache, prepare_faces
from uiface_diffusers.evaluation import load_lpips, reconstruction_quality
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.latents import decode_latents, encode_images

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
    return ["--config", str(workspace / "recipe.yaml"), "--output_dir", str(workspace / output), *options]


def train(workspace: Path, output: str, *options: str) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", workspace / "datasets")
        return run_script(script.main, options_of(workspace, output, *options))


def pictures(workspace: Path) -> torch.Tensor:
    cache = FaceCache(workspace / "cache")
    return torch.from_numpy(np.stack(list(cache.shard_images(cache.shards[0])))).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def uninterrupted(workspace) -> Path:
    result = train(workspace, "whole", "--validation_steps", "30")
    assert result.returncode == 0, result.stderr
    return workspace / "whole"


def test_learns_to_reconstruct_and_measures_its_latents(uninterrupted, workspace):
    vae = AutoModel.from_pretrained(str(uninterrupted)).eval()
    pixels = pictures(workspace)
    before = AutoModel.from_config(vae.config).eval()
    learnt, untrained = (reconstruction_quality(model, pixels).figures["l1"] for model in (vae, before))
    assert learnt < 0.5 * untrained
    # the latents that a denoiser sees have mean 0 and deviation 1
    latents = encode_images(vae, pixels.float() / 127.5 - 1)
    assert abs(latents.mean()) < 1e-3 and abs(latents.std() - 1) < 1e-3
    decoded = decode_latents(vae, latents)
    assert (decoded - vae.decode(vae.encode(pixels.float() / 127.5 - 1).latents).sample).abs().max() < 1e-4
    assert (uninterrupted / "validation" / "step-0000030.png").exists()


def test_sigkill_and_resume_gives_the_same_parameters(uninterrupted, workspace):
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    environment |= {"HF_DATASETS_CACHE": str(workspace / "datasets"), "TQDM_MININTERVAL": "0"}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *options_of(workspace, "killed", "--scale_equivariance_probability", "0")],
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    seen = b""
    while b"| 15/30" not in seen and process.poll() is None:
        seen += process.stderr.read1()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (workspace / "killed" / "config.json").exists()
    options = ("--resume_from_checkpoint", "latest", "--dataloader_num_workers", "2")
    result = train(workspace, "killed", *options)
    assert result.returncode == 0 and "resumed from" in result.stderr, result.stderr
    file = "diffusion_pytorch_model.safetensors"
    first, second = load_file(uninterrupted / file), load_file(workspace / "killed" / file)
    assert all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


@pytest.mark.parametrize("name", ["AutoencoderKL", "VQModel"])
def test_trains_diffusers_other_autoencoders(workspace, name):
    model = json.dumps({"_class_name": name, **MODELS[name]})
    options = ("--autoencoder", model, "--max_train_steps", "3", "--scale_equivariance_probability", "0.5")
    result = train(workspace, name, *options)
    assert result.returncode == 0, result.stderr
    vae = AutoModel.from_pretrained(str(workspace / name))
    assert type(vae).__name__ == name
    latents = encode_images(vae, pictures(workspace).float() / 127.5 - 1)
    assert latents.shape == (24, 4, 32, 32) and 0.8 < latents.std() < 1.3


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--lr_scheduler", "cosine_warm_restarts"), "lr_scheduler: cosine then, cosine_warm_restarts now"),
        (("--lr_warmup_steps", "3"), "lr_warmup_steps: 0 then, 3 now"),
        (("--freeze_encoder",), "freeze_encoder: False then, True now"),
    ],
)
def test_other_settings_are_refused_on_resume(uninterrupted, workspace, option, message):
    result = train(workspace, "whole", "--resume_from_checkpoint", "latest", *option)
    assert result.returncode != 0 and message in result.stderr


def test_a_frozen_encoder_keeps_the_latents(uninterrupted, workspace):
    result = train(
        workspace,
        "decoder",
        "--init_from",
        str(uninterrupted),
        "--freeze_encoder",
        "--autoencoder",
        "null",
        "--max_train_steps",
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
    weights = ("--lpips_weight", "2", "--identity_weight", "3", "--regularisation_weight", "5")
    args = script.parse_args(["--config", str(workspace / "recipe.yaml"), "--output_dir", "x", *weights])
    for halve in (False, True):
        torch.manual_seed(1)
        terms = script.autoencoder_loss(script.Reconstruction(vae), pixels, perceptual, recognizer, args, halve)
        torch.manual_seed(1)
        posterior = vae.encode(pixels).latent_dist
        z = posterior.mean + posterior.std * torch.randn(4, 4, 32, 32)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        target = F.interpolate(pixels, (32, 32), mode="area") if halve else pixels
        z = F.interpolate(z, (16, 16), mode="area") if halve else z
        y = vae.decode(z).sample
        expected = {"l1": (y - target).abs().mean(), "regularisation": 5 * kl}
        expected["lpips"] = 2 * lpips_by_hand(perceptual, backbone, target, y).mean()
        if not halve:
            cosine = (recognizer(y) * recognizer(pixels)).sum(dim=1)
            expected["identity"] = 3 * (1 - cosine).mean()
        assert terms.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(terms[name], value, rtol=1e-4, atol=1e-5), name


def lpips_by_hand(perceptual, backbone, first, second) -> torch.Tensor:
    """Zhang et al. 2018: unit-normalised features, squared differences, a learnt weight a channel, spatial means."""
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
    log, accelerator = script.LossLog(torch.device("cpu")), Accelerator(cpu=True)
    for l1, identity in ((1.0, 4.0), (float("nan"), 8.0), (3.0, None)):
        terms = {"l1": torch.tensor(l1)} | ({} if identity is None else {"identity": torch.tensor(identity)})
        log.add(sum(terms.values()), terms)
    assert log.take(accelerator) == ({"l1": 2.0, "identity": 4.0}, pytest.approx(2 / 3))
    log.add(torch.tensor(float("inf")), {"l1": torch.tensor(float("inf"))})
    assert log.take(accelerator) == ({}, 0.0)


def test_the_identity_loss_takes_any_onnx_recogniser(toy_root):
    """A file on its own is the recogniser of the pack that it is in."""
    (file,) = toy_root.glob("models/toy/recogniser.onnx")
    faces = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    alone, of_pack = (script.load_differentiable(name, str(toy_root)) for name in (str(file), "toy"))
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
        (("--init_from", "somewhere"), "give one of --autoencoder and --init_from"),
        (("--train_batch_size", "25"), "24 faces do not fill"),
        (("--train_data", "nowhere"), "no cache of prepared faces"),
    ],
)
def test_bad_input_is_named(workspace, options, message):
    result = train(workspace, "bad", *options)
    assert result.returncode != 0 and message in result.stderr
