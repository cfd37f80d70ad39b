"""What would go wrong or wait on a GPU, told without one: operands on two devices, and host waits per step."""

import json
import sys
from collections import Counter
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.hooks import CpuOffload, add_hook_to_module
from conftest import BETAS, REPOSITORY, TINY_UNET, run_script, tiny_autoencoder
from pretended_device import DEVICE, PretendedDevice, PretendedTensor, TwoDevicesError
from torch.optim.optimizer import register_optimizer_step_post_hook

from uiface_diffusers import IdentityBank, UIFacePipeline, generate_dataset
from uiface_diffusers.data import FaceCache, cache_latents, prepare_faces
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.generation import make_identities
from uiface_diffusers.latents import encode_pictures

sys.path.insert(0, str(REPOSITORY / "training"))

EMBEDS = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pretended():
    with PretendedDevice() as device:
        yield device


@pytest.fixture
def pipe(pretended, tiny_pipeline) -> UIFacePipeline:
    for name in ("vae", "unet", "identity_projector", "empty_context"):
        getattr(tiny_pipeline, name).to(pretended.device)
    return tiny_pipeline


# --- the device itself -----------------------------------------------------------------------------------------------


def test_it_computes_what_the_cpu_computes(pretended):
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.Flatten())
    x = torch.randn(2, 3, 5, 5)
    layer(x).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    layer.to(pretended.device)
    out = layer(x.to(pretended.device))
    out.square().mean().backward()
    assert out.device == DEVICE and all(parameter.device == DEVICE for parameter in layer.parameters())
    assert all(torch.equal(p.grad.cpu(), e) for p, e in zip(layer.parameters(), expected, strict=True))


def test_operands_on_two_devices_are_an_error(pretended):
    here, there = torch.ones(2, device=pretended.device), torch.ones(2)
    for operation in (
        lambda: here + there,
        lambda: torch.cat([there, here]),
        lambda: there[here.long()],
        lambda: here.index_put_((torch.tensor([0]),), there[:1]),
        lambda: F.linear(here, torch.ones(2, 2)),
    ):
        with pytest.raises(TwoDevicesError, match="operands on meta:1 and cpu"):
            operation()
    assert (here + torch.tensor(1.0)).tolist() == [2, 2]  # numbers may come from the host
    with pytest.raises(TypeError, match="numpy"):
        here.numpy()


@pytest.mark.parametrize(
    ("operation", "waits"),
    [
        (lambda x: x + 1, 0),
        (lambda x: torch.where(x > 0, x, 0.0), 0),
        (lambda x: x[:1].fill_(1), 0),
        (lambda x: torch.ones(2).to(x.device, non_blocking=True), 0),
        (lambda x: torch.ones(2).to(x.device), 1),
        (lambda x: torch.tensor([1.0], device=x.device), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.sum() > 0), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x[torch.tensor([0])], 1),
        (lambda x: x.__setitem__(0, True), 1),
    ],
)
def test_what_waits_is_counted(pretended, operation, waits):
    x = torch.ones(3, device=pretended.device)
    operation(x)
    assert sum(pretended.waits.values()) == waits


# --- sampling --------------------------------------------------------------------------------------------------------


def waits_of_steps(pretended, pipe, **options) -> list[Counter]:
    """The waits in every step but the first, whose start is the call's."""
    seen = []

    def record(pipe, step, t, tensors):
        seen.append(pretended.waits.copy())
        return {}

    call = {"num_inference_steps": 10, "latest_boundary": 300, "output_type": "latent", **options}
    generator = [torch.Generator().manual_seed(seed) for seed in range(3)]
    out = pipe(EMBEDS, generator=generator, callback_on_step_end=record, **call)
    assert out.images.device == DEVICE
    return [later - earlier for earlier, later in zip(seen[:-1], seen[1:], strict=True)]


@pytest.mark.parametrize(
    "options",
    [{"boundary": 500}, {"boundary": 500, "reuse_empty_branch": 2}, {"boundary": None}, {"guide_from_boundary": True}],
    ids=str,
)
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_a_step_of_sampling_waits_for_a_boundary_only(pretended, pipe, name, options):
    pipe.scheduler = getattr(diffusers, name)(**BETAS)
    steps = waits_of_steps(pretended, pipe, boundary_threshold=0.06, **options)
    if "boundary" in options:
        assert not any(steps)
        return
    # while samples seek: one line, once per step
    assert any(steps) and all(sum(waits.values()) <= 1 for waits in steps)
    assert len({line for waits in steps for line in waits}) == 1
    assert not any(steps[7:])


def test_an_offloaded_first_stage_encodes_pictures_where_it_computes(pretended, tiny_pipeline):
    add_hook_to_module(tiny_pipeline.vae, CpuOffload(pretended.device))
    pictures = [np.zeros((64, 64, 3), np.uint8)]
    assert encode_pictures(tiny_pipeline.vae, pictures, 8, 8, pretended.device).device == DEVICE


@pytest.mark.parametrize("output_type", ["latent", "pt", "np", "pil"])
def test_all_outputs_equal_those_of_the_cpu(tiny_pipeline, output_type):
    call = {"num_inference_steps": 4, "output_type": output_type}

    def sample():
        return tiny_pipeline(EMBEDS, generator=[torch.Generator().manual_seed(i) for i in range(3)], **call)

    expected = sample()
    with PretendedDevice() as pretended:
        for name in ("vae", "unet", "identity_projector", "empty_context"):
            getattr(tiny_pipeline, name).to(pretended.device)
        found = sample()
        images = found.images.cpu() if isinstance(found.images, torch.Tensor) else found.images
    assert torch.equal(found.boundary_timesteps, expected.boundary_timesteps)
    for image, other in zip(images, expected.images, strict=True):
        assert np.abs(np.asarray(image, dtype=float) - np.asarray(other, dtype=float)).max() <= 1e-4


def test_embeddings_of_either_device_give_the_same(pretended, pipe):
    call = {"num_inference_steps": 2, "output_type": "latent"}
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = pipe(EMBEDS, latents=noise, **call).images
    for embeddings in (EMBEDS.to(pretended.device), list(EMBEDS.to(pretended.device)), EMBEDS.numpy()):
        assert torch.equal(pipe(embeddings, latents=noise, **call).images, expected)
    assert torch.equal(pipe(EMBEDS, latents=noise.to(pretended.device), **call).images, expected)


# --- data sets and identities ----------------------------------------------------------------------------------------


BANK = IdentityBank(F.normalize(EMBEDS), "toy")


def contents(folder: Path) -> dict[str, bytes | int]:
    """All files; of safetensors, whose header has no fixed order, the length."""
    files = {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: len(content) if name.endswith(".safetensors") else content for name, content in files.items()}


def to_pretended(pipe: UIFacePipeline) -> None:
    for name in ("vae", "unet", "identity_projector", "empty_context"):
        getattr(pipe, name).to(DEVICE)


@pytest.mark.parametrize("output_format", ["imagefolder", "webdataset"])
def test_a_data_set_made_beside_sampling_is_the_same(tiny_pipeline, toy_root, output_format, tmp_path):
    """On the CPU one thread writes; beside another device one decodes and several encode."""
    encoder = FaceEncoder("toy", str(toy_root), det_size=160)
    options = {"size": 16, "batch_size": 4, "num_inference_steps": 2, "identity_perturbation": (0.6, 0.9)}
    options |= {"encoder": encoder, "min_similarity": 0.1, "max_attempts": 3, "output_format": output_format}
    generate_dataset(tiny_pipeline, BANK, tmp_path / "cpu", 7, **options)
    with PretendedDevice():
        to_pretended(tiny_pipeline)
        report = generate_dataset(tiny_pipeline, BANK, tmp_path / "pretended", 7, **options)
    assert report.complete and report.made == 21
    expected, found = contents(tmp_path / "cpu"), contents(tmp_path / "pretended")
    assert found.pop("generation.json").replace(b"meta", b"cpu") == expected.pop("generation.json")
    assert found == expected


def test_rows_are_of_complete_images_only(tiny_pipeline, tmp_path):
    """Writing fails in one of the threads; the same call goes on where it was."""
    options = {"size": 16, "batch_size": 4, "num_inference_steps": 2}
    generate_dataset(tiny_pipeline, BANK, tmp_path / "whole", 7, **options)
    folder = tmp_path / "failed"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / BANK.names[1]).write_bytes(b"in the way")
    with PretendedDevice():
        to_pretended(tiny_pipeline)
        with pytest.raises(OSError, match="cannot be written.*run the same command again"):
            generate_dataset(tiny_pipeline, BANK, folder, 7, **options)
        rows = [json.loads(line) for file in folder.glob("journal/*") for line in file.read_text().splitlines()]
        # the first batch is of one identity, the second one is not
        assert [(row["identity"], row["index"]) for row in rows] == [(BANK.names[0], n) for n in range(4)]
        assert not list(folder.rglob("*.part"))
        (folder / "images" / BANK.names[1]).unlink()
        assert generate_dataset(tiny_pipeline, BANK, folder, 7, **options).made == 17
    assert contents(folder) == contents(tmp_path / "whole")


def test_identities(pretended, pipe, toy_root, tmp_path):
    encoder = FaceEncoder("toy", str(toy_root), det_size=160)
    encoder.detect = lambda picture: [None]  # an untrained model makes no faces
    output = tmp_path / "bank.safetensors"
    report = make_identities(pipe, encoder, 2, output, max_similarity=1.0, batch_size=2, num_inference_steps=2)
    assert report["kept"] == 2 and len(IdentityBank.load(output)) == 2


# --- training --------------------------------------------------------------------------------------------------------


class NotFusedAdamW(torch.optim.AdamW):
    """Fused kernels are for devices that torch knows."""

    def __init__(self, parameters, fused: bool | None = None, **options):
        super().__init__(parameters, **options)


class EnoughSteps(BaseException):
    """Ends a training."""


def waits_of_training(script, argv: list[str], steps: int = 3) -> list[Counter]:
    """The waits in every step but the first of a training on the device, which ends after `steps`."""
    seen, first = [], []
    with PretendedDevice() as pretended, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "device", property(lambda accelerator: pretended.device))
        patch.setattr(torch.optim, "AdamW", NotFusedAdamW)

        def count(optimizer, args, kwargs) -> None:
            first.extend([optimizer] * (not first))
            if optimizer is first[0]:  # of the discriminator, another one
                assert all(
                    isinstance(parameter, PretendedTensor) and isinstance(parameter.grad, PretendedTensor | None)
                    for group in optimizer.param_groups
                    for parameter in group["params"]
                )
                seen.append(pretended.waits.copy())
            if len(seen) > steps:
                raise EnoughSteps

        hook = register_optimizer_step_post_hook(count)
        try:
            with pytest.raises(EnoughSteps):
                result = run_script(script.main, argv)
                pytest.fail(result.stderr)
        finally:
            hook.remove()
    return [later - earlier for earlier, later in zip(seen[:-1], seen[1:], strict=True)]


@pytest.fixture(scope="module")
def faces(tmp_path_factory, toy_root, toy_photographs) -> Path:
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("faces") / "faces"
    prepare_faces(toy_photographs, folder, FaceEncoder("toy", str(toy_root), det_size=160), image_size=64)
    return folder


RARELY = ["--checkpointing-steps", "1000", "--logging-steps", "1000", "--validation-steps", "0", "--report-to", "none"]
RARELY += ["--max-grad-norm", "1", "--max-train-steps", "100", "--train-batch-size", "4", "--max-train-hours", "1"]


@pytest.mark.parametrize("losses", [False, True], ids=["plain", "identity and LPIPS"])
def test_a_step_of_train_waits_for_nothing(faces, toy_root, backbone, losses, tmp_path):
    import train as script

    vae = tiny_autoencoder()
    vae.save_pretrained(tmp_path / "vae")
    cache_latents(FaceCache(faces), vae)
    unet = {k: v for k, v in TINY_UNET.items() if k not in ("in_channels", "out_channels", "sample_size")}
    options = ["--train-data", str(faces), "--vae", str(tmp_path / "vae"), "--unet", json.dumps(unet), *RARELY]
    options += ["--output-dir", str(tmp_path / "run"), "--prediction-type", "v_prediction", "--snr-gamma", "5"]
    if losses:
        pytest.importorskip("onnx2torch")
        pytest.importorskip("lpips")
        options += ["--encoder-root", str(toy_root), "--identity-weight", "0.3", "--decoded-samples", "2"]
        options += ["--lpips-weight", "0.1", "--lpips-backbone", str(backbone), "--decoded-noise", "low"]
    assert not any(waits_of_training(script, options))


def test_a_step_of_train_autoencoder_waits_for_nothing(faces, toy_root, backbone, tmp_path):
    pytest.importorskip("lpips")
    pytest.importorskip("onnx2torch")
    import train_autoencoder as script

    blocks = {f"{part}_block_out_channels": [16, 16] for part in ("encoder", "decoder")}
    blocks |= {f"num_{part}_blocks": [1, 1] for part in ("encoder", "decoder")}
    config = json.dumps({"_class_name": "AutoencoderTiny", **blocks})
    options = ["--train-data", str(faces), "--autoencoder", config, "--lpips-backbone", str(backbone), *RARELY]
    options += ["--output-dir", str(tmp_path / "run"), "--adversarial-weight", "0.1", "--facial-features"]
    options += ["--identity-weight", "0.5", "--identity-encoder", "toy", "--encoder-root", str(toy_root)]
    assert not any(waits_of_training(script, options))


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("head", ["arcface", "adaface"])
def test_a_step_of_train_face_recognition_waits_for_nothing(head, sampled, tmp_path):
    import train_face_recognition as script

    generator = np.random.default_rng(0)
    for identity in range(3):
        (tmp_path / "faces" / f"person_{identity}").mkdir(parents=True)
        for index in range(4):
            picture = PIL.Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            picture.save(tmp_path / "faces" / f"person_{identity}" / f"{index}.png")
    config = json.dumps({"layers": 18, "width": 4, "embedding_dim": 16, "image_size": 32, "dropout": 0.1})
    options = ["--train-data", str(tmp_path / "faces"), "--recognizer", config, "--head", head, *RARELY]
    options += ["--output-dir", str(tmp_path / "run")]
    if sampled:
        options += ["--class-sample-rate", "0.5", "--train-batch-size", "2"]
    assert not any(waits_of_training(script, options))
