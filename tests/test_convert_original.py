import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES
from diffusers import VQModel
from original_weights import BLOCKS, LEVELS, original_first_stage
from safetensors.torch import load_file

from uiface_diffusers import UIFacePipeline, cli
from uiface_diffusers.convert_original import convert_first_stage, convert_original
from uiface_diffusers.latents import decode_latents, encode_images


class OriginalFirstStage:
    """Its mathematics (Esser et al. 2021; latent-diffusion), written out."""

    def __init__(self, state):
        self.state = state

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def block(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x)

    def middle(self, side, x):
        x = self.block(f"{side}.mid.block_1", x)
        h = self.norm(f"{side}.mid.attn_1.norm", x)
        q, k, v = (self.conv(f"{side}.mid.attn_1.{name}", h).flatten(2) for name in "qkv")
        weights = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) * q.shape[1] ** -0.5, dim=-1)
        attended = torch.einsum("bqk,bck->bcq", weights, v).unflatten(2, x.shape[2:])
        return self.block(f"{side}.mid.block_2", x + self.conv(f"{side}.mid.attn_1.proj_out", attended))

    def encode(self, x):
        x = self.conv("encoder.conv_in", x, padding=1)
        for level in range(len(LEVELS)):
            for number in range(BLOCKS):
                x = self.block(f"encoder.down.{level}.block.{number}", x)
            if level < len(LEVELS) - 1:
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = F.silu(self.norm("encoder.norm_out", self.middle("encoder", x)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x, padding=1))

    def decode(self, latents):
        codes = self.state["quantize.embedding.weight"]
        nearest = torch.cdist(latents.permute(0, 2, 3, 1).flatten(0, 2), codes).argmin(dim=1)
        x = codes[nearest].unflatten(0, (len(latents), *latents.shape[2:])).permute(0, 3, 1, 2)
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", x), padding=1))
        for level in reversed(range(len(LEVELS))):
            for number in range(BLOCKS + 1):
                x = self.block(f"decoder.up.{level}.block.{number}", x)
            if level:
                x = self.conv(f"decoder.up.{level}.upsample.conv", F.interpolate(x, scale_factor=2), padding=1)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), padding=1)


@torch.no_grad()
def test_first_stage_computes_what_the_original_does():
    state = original_first_stage()
    original, vae = OriginalFirstStage(state), convert_first_stage(state)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = encode_images(vae, pixels)
    assert latents.shape == (2, 3, 8, 8)
    assert torch.allclose(latents, original.encode(pixels), atol=1e-4)
    assert torch.allclose(decode_latents(vae, latents), original.decode(latents), atol=1e-3)


def test_first_stages_that_do_not_fit_are_named():
    state = original_first_stage()
    with pytest.raises(ValueError, match="has tensors that a VQModel has not: .'loss.weight'"):
        convert_first_stage({**state, "loss.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="(?s)does not fit diffusers' VQModel.*decoder.conv_out.weight"):
        convert_first_stage({name: tensor for name, tensor in state.items() if name != "decoder.conv_out.weight"})
    with pytest.raises(ValueError, match="quantize.embedding.weight.* is missing"):
        convert_first_stage({name: tensor for name, tensor in state.items() if "quantize" not in name})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The reference's denoiser and a first stage, as files of PyTorch."""
    root = tmp_path_factory.mktemp("original")
    state = {name: tensor.float() for name, tensor in load_file(FIXTURES / "reference_a.weights.safetensors").items()}
    torch.save({"state_dict": state}, root / "unet.pt")
    config = json.loads((FIXTURES / "reference_a.json").read_text())["model"]
    (root / "config.json").write_text(json.dumps(config))
    first_stage = original_first_stage()
    encoder = {name: tensor for name, tensor in first_stage.items() if name.startswith(("encoder.", "quant_conv."))}
    torch.save(encoder, root / "encoder.pt")
    torch.save({name: tensor for name, tensor in first_stage.items() if name not in encoder}, root / "decoder.pt")
    convert_first_stage(first_stage).save_pretrained(root / "vq")
    return root


@pytest.mark.parametrize("first_stage", ["files", "folder"])
def test_command_converts_the_published_files(files, tmp_path, reference, first_stage):
    arguments = ["--unet", files / "unet.pt", "--model-config", files / "config.json", "--sample-size", "16"]
    if first_stage == "files":
        arguments += ["--vq-encoder", files / "encoder.pt", "--vq-decoder", files / "decoder.pt"]
    else:
        arguments += ["--vq-model", files / "vq"]
    arguments += ["--output", tmp_path / "out", "--identity-encoder", "elasticface"]
    cli.main(["convert-original", *map(str, arguments)])
    pipe = UIFacePipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.vae, VQModel) and pipe.vae.config.scaling_factor == 1
    assert pipe.unet.config.sample_size == 16 and pipe.identity_projector.config.identity_encoder == "elasticface"
    # parity: the whole two-stage run of the reference
    sampling = reference.sampling
    out = pipe(
        reference["context"],
        num_inference_steps=sampling["ddim_steps"],
        boundary_threshold=sampling["mse_threshold"],
        latest_boundary=sampling["step_threshold"],
        guidance_scale=1 + sampling["cfg_scale_w"],
        latents=reference["x_T"],
        output_type="latent",
    )
    assert (out.images - reference["x_0"]).abs().max() < 1e-3
    assert [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".py")] == []


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_files_with_code_are_not_executed(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt is damaged, or holds more than tensors"):
        convert_original(tmp_path / "evil.pt", tmp_path / "out")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()
    (tmp_path / "half.pt").write_bytes((files / "unet.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="half.pt is damaged"):
        convert_original(tmp_path / "half.pt", tmp_path / "out")


def test_half_a_first_stage_is_an_error(files, tmp_path):
    with pytest.raises(ValueError, match="encoder and decoder"):
        convert_original(files / "unet.pt", tmp_path / "out", vq_encoder=files / "encoder.pt")


def test_without_a_first_stage_one_is_passed(files, tmp_path):
    config = json.loads((files / "config.json").read_text())
    convert_original(files / "unet.pt", tmp_path / "out", model_config=config, sample_size=16)
    vae = VQModel.from_pretrained(files / "vq")
    pipe = UIFacePipeline.from_pretrained(tmp_path / "out", vae=vae)
    assert pipe.vae is vae


MAKE_PUBLISHED = """
import re, sys
import torch
from uiface_diffusers.convert_original import PUBLISHED_MODEL_CONFIG, convert_original_state_dict

# the names and shapes, from the message about what is missing
try:
    convert_original_state_dict({"nothing": torch.zeros(1)}, PUBLISHED_MODEL_CONFIG)
except ValueError as error:
    names = [line.split(": ")[1] for line in str(error).splitlines() if line.strip().startswith("missing")]
try:
    convert_original_state_dict({name: torch.zeros(0) for name in names}, PUBLISHED_MODEL_CONFIG)
except ValueError as error:
    lines = [line.split("instead of") for line in str(error).splitlines() if line.strip().startswith("shape of")]
# "shape of NAME: (0,) instead of (64, 32)"
shapes = {left.split()[2].rstrip(":"): [int(n) for n in re.findall(r"\\d+", right)] for left, right in lines}
torch.manual_seed(0)
state = {name: torch.randn(shape) for name, shape in shapes.items()}
print(sum(tensor.numel() for tensor in state.values()))
torch.save(state, sys.argv[1])
"""
CONVERT_PUBLISHED = """
import resource, sys
from uiface_diffusers.convert_original import convert_original

convert_original(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_the_published_size_converts_in_three_times_its_memory(tmp_path):
    """All of the process, Python and torch included; against the size of the file."""

    def run(script: str, *arguments) -> int:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert round(run(MAKE_PUBLISHED, tmp_path / "unet.pt") / 1e6, 1) == 216.3
    size = (tmp_path / "unet.pt").stat().st_size
    peak = run(CONVERT_PUBLISHED, tmp_path / "unet.pt", tmp_path / "out")
    print(f"file {size / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB: {peak / size:.2f} x")
    assert peak <= 3 * size
