import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import TINY_UNET, tiny_autoencoder, write_toy_pack
from diffusers import DDPMScheduler
from filelock import FileLock
from hub_server import HubServer
from huggingface_hub import ModelCard
from processes import Running, run_distributed
from safetensors.torch import load_file
from tiny_training import TRAIN, Oracle, options_of, train, train_script, write_workspace

from uiface_diffusers import EmptyContext, IdentityProjector, UIFacePipeline, UIFaceUNet2DModel
from uiface_diffusers.convert_original import NOISE_SCHEDULE
from uiface_diffusers.data import FaceCache, LatentSet, cache_latents, prepare_faces
from uiface_diffusers.evaluation import load_lpips
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.hub.lineage import read_header
from uiface_diffusers.seeds import mix_seed
from uiface_diffusers.training import denoising
from uiface_diffusers.training.datasets import LatentFaces
from uiface_diffusers.training.losses import draw_rows, facial_feature_weights, jitter
from uiface_diffusers.training.order import EndlessBatchSampler, sampling_weights


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, toy_root, toy_photographs):
    return write_workspace(tmp_path_factory.mktemp("train"), toy_root, toy_photographs)


def command(workspace: Path, output: str, *options: str, launch: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *launch, str(TRAIN), *options_of(workspace, output, *options)]


def launch(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args, **kwargs), capture_output=True, text=True, env=environment())


def environment() -> dict[str, str]:
    # one thread: nothing is left to the order in which threads add
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


def parameters(folder: Path, folders: str = "*") -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(folder.glob(f"{folders}/*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_equal_parameters(a: Path, b: Path, folders: str = "*") -> None:
    first, second = parameters(a, folders), parameters(b, folders)
    assert first.keys() == second.keys() and len(first) > 50
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(workspace) -> Path:
    result = train(workspace, "whole")
    assert result.returncode == 0, result.stderr
    return workspace / "whole"


def test_saves_a_pipeline(uninterrupted, workspace):
    pipe = UIFacePipeline.from_pretrained(uninterrupted)
    assert pipe.identity_projector.config.identity_encoder == "toy"
    assert pipe.unet.config.sample_size == 8
    pipe.set_progress_bar_config(disable=True)
    images = pipe(np.eye(16, dtype=np.float32)[:2], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3) and np.isfinite(images).all()
    # what starts at zero has moved, the first stage has not
    assert pipe.unet.conv_out.weight.abs().sum() > 0
    saved, given = parameters(uninterrupted), load_file(workspace / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[f"vae/{name}"], tensor) for name, tensor in given.items())
    assert [p.name for p in uninterrupted.iterdir() if p.suffix in (".bin", ".pt", ".pkl")] == []


def test_sigkill_and_resume_gives_the_same_parameters(uninterrupted, workspace):
    """Killed at a step between two checkpoints."""
    Running("train", options_of(workspace, "killed")).kill_at("| 26/60")
    checkpoints = sorted(int(p.name.split("-")[1]) for p in (workspace / "killed").glob("checkpoint-*"))
    assert checkpoints and not (workspace / "killed" / "model_index.json").exists()
    result = train(workspace, "killed", "--resume-from-checkpoint", "latest")
    assert result.returncode == 0, result.stderr
    assert f"| {checkpoints[-1]}/60" in result.stderr
    assert_equal_parameters(workspace / "killed", uninterrupted)


def test_an_unfinished_checkpoint_is_not_resumed(uninterrupted, workspace):
    """What a kill within the writing of a checkpoint, or within the removal of an old one, leaves behind."""
    folder = workspace / "part"
    assert train(workspace, "part", "--max-train-steps", "14").returncode == 0
    for name in ("optimizer.bin", "training.json"):
        (folder / "checkpoint-14" / name).unlink()
    (folder / "checkpoint-14").rename(folder / "checkpoint.part")
    result = train(workspace, "part", "--resume-from-checkpoint", "latest")
    assert result.returncode == 0 and "| 7/60" in result.stderr, result.stderr
    assert_equal_parameters(folder, uninterrupted)


def test_checkpoints_hold_no_pickled_weights(uninterrupted):
    checkpoints = sorted(uninterrupted.glob("checkpoint*"))
    assert [p.name for p in checkpoints] == ["checkpoint-56", "checkpoint-60"]  # the limit is 2
    # the pipeline has the EMA weights, which are not those of the optimizer
    ema = load_file(checkpoints[-1] / "ema.safetensors")
    model = load_file(checkpoints[-1] / "model.safetensors")
    saved = parameters(uninterrupted)["empty_context/embedding"]
    assert any(tensor.shape == saved.shape and torch.equal(tensor, saved) for tensor in ema.values())
    assert not torch.equal(model["empty_context.embedding"], saved)


def test_workers_change_nothing(uninterrupted, workspace):
    result = train(workspace, "workers", "--dataloader-num-workers", "2")
    assert result.returncode == 0, result.stderr
    assert_equal_parameters(workspace / "workers", uninterrupted)


def test_another_seed_gives_other_parameters(uninterrupted, workspace):
    result = train(workspace, "seed", "--seed", "1", "--max-train-steps", "2")
    assert result.returncode == 0, result.stderr
    assert not torch.equal(
        parameters(workspace / "seed")["empty_context/embedding"],
        parameters(uninterrupted)["empty_context/embedding"],
    )


def test_accelerate_launch_trains(workspace):
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no")
    result = launch(workspace, "launched", "--max-train-steps", "3", launch=launcher)
    assert result.returncode == 0, result.stderr
    assert [p.name for p in (workspace / "launched").glob("checkpoint*")] == ["checkpoint-3"]
    UIFacePipeline.from_pretrained(workspace / "launched")


def test_two_processes_train_one_model(workspace):
    """One set of files and the same parameters as without a resume; the schedule goes on by optimizer steps, not by
    processes."""
    options = ("--validation-steps", "4", "--validation-inference-steps", "2", "--checkpointing-steps", "3")
    options += ("--lr-scheduler", "constant_with_warmup", "--lr-warmup-steps", "8", "--logging-steps", "1")
    run_distributed("train", options_of(workspace, "two_whole", *options, "--max-train-steps", "6"))
    options += ("--report-to", "tensorboard")
    run_distributed("train", options_of(workspace, "two", *options, "--max-train-steps", "3"))
    options += ("--resume-from-checkpoint", "latest")
    written = run_distributed("train", options_of(workspace, "two", *options, "--max-train-steps", "6"))
    assert "samples=48" in written and written.count("pipeline saved") == 1
    folder = workspace / "two"
    assert sorted(p.name for p in folder.glob("checkpoint*")) == ["checkpoint-3", "checkpoint-6"]
    grids = sorted(p.name for p in (folder / "validation").iterdir())
    assert grids == ["step-0000003.png", "step-0000004.png", "step-0000006.png"]
    runs = sorted((folder / "logs" / "train").glob("events.out.tfevents*"))  # one a run, of the main process
    rates = [event.value for run in runs for event in scalars(run, "lr")]
    assert rates == pytest.approx([1e-3 * step / 8 for step in range(1, 7)])
    UIFacePipeline.from_pretrained(folder)
    assert_equal_parameters(folder, workspace / "two_whole", "[!c]*")


def scalars(path: Path, name: str) -> list:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path))
    events.Reload()
    return events.Scalars(name)


def test_the_average_follows_the_published_decay(workspace):
    """After step n the average keeps 1 - n ** -0.75 of itself."""
    options = ("--max-train-steps", "4", "--checkpointing-steps", "1", "--checkpoints-total-limit", "9")
    result = train(workspace, "averages", *options)
    assert result.returncode == 0, result.stderr
    pipe = UIFacePipeline.from_pretrained(workspace / "averages")
    model = denoising.ConditionalDenoiser(pipe.unet, pipe.identity_projector, pipe.empty_context)
    average = {}
    for step in range(1, 5):
        folder, decay = workspace / "averages" / f"checkpoint-{step}", 1 - step**-0.75
        weights, stored = load_file(folder / "model.safetensors"), load_file(folder / "ema.safetensors")
        for number, (name, _) in enumerate(model.named_parameters()):
            average[name] = decay * average.get(name, 0) + (1 - decay) * weights[name]
            assert torch.allclose(stored[str(number)], average[name], atol=1e-6), (step, name)
    for name, parameter in model.named_parameters():  # what is saved
        assert torch.allclose(parameter, average[name], atol=1e-6), name


@pytest.mark.parametrize("by", ["processes", "accumulation"])
def test_the_gradients_of_two_batches_are_averaged(workspace, by):
    """A step of two batches, one per process or one after the other, against the same step by hand: both batches, mean
    gradient, one AdamW step."""
    if by == "processes":
        written = run_distributed("train", options_of(workspace, by, "--max-train-steps", "1"))
    else:
        result = train(workspace, by, "--max-train-steps", "1", "--gradient-accumulation-steps", "2")
        assert result.returncode == 0, result.stderr
        written = result.stderr
    assert "samples=8" in written
    theirs = load_file(workspace / by / "checkpoint-1" / "model.safetensors")

    cache = FaceCache(workspace / "cache")
    vae = tiny_autoencoder()
    dataset = LatentFaces(LatentSet(cache_latents(cache, vae)), cache.embeddings().embeddings)
    torch.manual_seed(0)
    unet = UIFaceUNet2DModel(**TINY_UNET)
    unet.zero_init_residual_branches()
    model = denoising.ConditionalDenoiser(unet, IdentityProjector(16, 32), EmptyContext(32))
    scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(mix_seed(0, 0))).tolist()
    for batch in range(2):
        latents, embeds = dataset.__getitems__(order[4 * batch : 4 * batch + 4])
        rank, part = (batch, 0) if by == "processes" else (0, batch)
        torch.manual_seed(mix_seed(0, 0, rank, part))
        loss = denoising.denoising_loss(model, scheduler, latents, embeds, 0.2, None)
        (loss.losses.mean() / 2).backward()
    optimizer.step()
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    # AdamW's first step is the sign of the gradient: compare where that is not a matter of rounding
    for name, parameter in model.named_parameters():
        clear = parameter.grad.abs() > 1e-6
        assert torch.allclose(ours[name][clear], theirs[name][clear], atol=1e-5), name


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_objective(prediction_type):
    """The loss is zero for the right prediction, and the mean square of the error otherwise."""
    scheduler = DDPMScheduler(**NOISE_SCHEDULE, prediction_type=prediction_type)
    face = torch.randn(1, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    latents, embeds = face.expand(512, 2, -1, -1, -1).contiguous(), torch.randn(512, 8)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)

    def right(noisy, timesteps):
        a = alpha_bar[timesteps][:, None, None, None]
        noise = (noisy - a.sqrt() * face[0]) / (1 - a).sqrt()
        return noise if prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * face[0]

    torch.manual_seed(1)
    oracle = Oracle(right)
    loss = denoising.denoising_loss(oracle, scheduler, latents, embeds, 0.2, None)
    assert loss.losses.shape == (512,) and loss.losses.max() < 1e-4
    # of the predicted noise, the clean latents are had back but where they have nearly vanished
    clear = loss.timesteps < 600 if prediction_type == "epsilon" else slice(None)
    assert (loss.denoised - face[0])[clear].abs().max() < 1e-3
    wrong = denoising.denoising_loss(
        Oracle(lambda *args: right(*args) + 0.5), scheduler, latents, embeds, 0.2, None
    ).losses
    assert torch.allclose(wrong, torch.full((512,), 0.25), atol=1e-2)
    assert oracle.asked["is_empty"][0] and abs(oracle.asked["is_empty"].float().mean() - 0.2) < 0.06
    assert oracle.asked["timesteps"].min() < 50 and oracle.asked["timesteps"].max() > 950
    # min-SNR (Hang et al. 2023, sec. 3.4): min(snr, gamma) / snr, for the velocity / (snr + 1)
    torch.manual_seed(1)
    oracle = Oracle(lambda *args: right(*args) + 0.5)
    weighted = denoising.denoising_loss(oracle, scheduler, latents, embeds, 0.2, 5.0).losses
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(max=5) / (snr if prediction_type == "epsilon" else snr + 1)
    assert torch.allclose(weighted, 0.25 * weight[oracle.asked["timesteps"]], atol=1e-2)


def test_both_flips_are_trained():
    scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    latents = torch.stack([torch.full((400, 1, 2, 2), 3.0), torch.full((400, 1, 2, 2), -3.0)], 1)
    oracle = Oracle(lambda noisy, timesteps: noisy)
    denoising.denoising_loss(oracle, scheduler, latents, torch.zeros(400, 4), 0.0, None)
    early = oracle.asked["timesteps"] < 100
    signs = oracle.asked["noisy"][early].mean(dim=(1, 2, 3)).sign()
    assert 0.2 < (signs > 0).float().mean() < 0.8


def test_the_log_tells_quarters_and_contexts_apart():
    """Against sums by hand, over two steps; a loss that is not finite is counted but left out."""
    accelerator = Accelerator(cpu=True)
    log = denoising.DenoisingLog(1000, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    losses, timesteps = torch.rand(2, 40, generator=generator), torch.randint(1000, (2, 40), generator=generator)
    is_empty = torch.rand(2, 40, generator=generator) < 0.3
    losses[0, 5] = float("nan")
    timesteps[0, 5], is_empty[0, 5] = 999, True
    for row in zip(losses, timesteps, is_empty, strict=True):
        log.add(denoising.DenoisingLoss(*row, denoised=None, latents=None))
    means, finite = log.take(accelerator)
    ok = losses.isfinite()
    expected = {"loss": ok, "loss/empty": ok & is_empty, "loss/identity": ok & ~is_empty}
    expected |= {f"loss/quarter_{q + 1}": ok & (timesteps >= 250 * q) & (timesteps < 250 * q + 250) for q in range(4)}
    assert means.keys() == expected.keys() and finite == pytest.approx(79 / 80)
    for name, chosen in expected.items():
        assert means[name] == pytest.approx(losses[chosen].mean().item(), abs=1e-6), name
    for cosines, lpips in (([0.5, 0.9], [0.2, 0.4]), ([0.0, 0.1], [0.0, 0.2])):
        loss = denoising.DenoisingLoss(torch.ones(3), torch.zeros(3, dtype=int), torch.ones(3, dtype=bool), None, None)
        counts = torch.tensor([True, cosines[0] == 0.0])
        log.add(loss, denoising.FaceLosses(torch.tensor(cosines), counts, torch.tensor(lpips)))
    means = {"loss": 1.0, "loss/quarter_1": 1.0, "loss/empty": 1.0, "identity_cosine": pytest.approx(0.2)}
    means["lpips"] = pytest.approx(0.2)
    assert log.take(accelerator) == (means, 1.0)


def six_denoised_faces(side: int = 8) -> tuple:
    torch.manual_seed(0)
    vae = tiny_autoencoder().requires_grad_(False)
    denoised, identities = torch.randn(6, 4, side, side, requires_grad=True), F.normalize(torch.randn(6, 16))
    is_empty = torch.tensor([True, False, False, True, False, False])
    clean = torch.randn(6, 4, side, side)
    loss = denoising.DenoisingLoss(torch.zeros(6), torch.zeros(6, dtype=int), is_empty, denoised, clean)
    return vae, loss, identities


def test_the_denoised_face_is_compared_with_the_identity_it_was_given(toy_root):
    """Against the jittered pictures of the decoder, embedded by onnxruntime; the gradient leads to a larger cosine."""
    vae, loss, identities = six_denoised_faces()
    encoder = FaceEncoder("toy", str(toy_root), det_size=160)

    def seeded(loss):
        torch.manual_seed(1)
        return denoising.face_losses(vae, encoder.to_torch(), None, loss, identities, 3)

    found = seeded(loss)
    assert found.has_identity.all() and found.lpips.abs().max() == 0
    torch.manual_seed(1)
    rows = draw_rows((~loss.is_empty).float(), 3)
    assert set(rows.tolist()) < {1, 2, 4, 5}
    faces = vae.decode(loss.denoised.detach()[rows] / vae.config.scaling_factor).sample
    pixels = F.interpolate(jitter(faces), (112, 112), mode="bilinear", antialias=True)
    session = encoder.recognizer.session
    features = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[0]
    expected = (F.normalize(torch.from_numpy(features)) * identities[rows]).sum(dim=1)
    assert torch.allclose(found.cosines, expected, atol=1e-3)
    (gradient,) = torch.autograd.grad(found.cosines.sum(), loss.denoised)
    assert gradient[[0, 3]].abs().max() == 0
    step = loss._replace(denoised=loss.denoised + 0.1 * gradient / gradient.norm())
    assert seeded(step).cosines.sum() > found.cosines.sum()
    none_given = loss._replace(is_empty=torch.ones(6, dtype=torch.bool))
    assert not seeded(none_given).has_identity.any()


def test_lpips_of_the_denoised_face(backbone):
    """It is the mean of the distance's map with the weights of the facial features; none at the clean latents."""
    vae, loss, identities = six_denoised_faces(side=32)
    perceptual = load_lpips("alex", backbone)
    perceptual.spatial = True
    found = denoising.face_losses(vae, None, perceptual, loss, identities, 6).lpips
    faces, clean = (vae.decode(each / vae.config.scaling_factor).sample for each in (loss.denoised, loss.latents))
    weights = facial_feature_weights(faces.shape[-1])
    expected = (perceptual(clean, faces) * weights).mean(dim=(1, 2, 3))
    assert torch.allclose(found.sort().values, expected.sort().values, atol=1e-5)
    same = loss._replace(denoised=loss.latents)
    assert denoising.face_losses(vae, None, perceptual, same, identities, 6).lpips.abs().max() < 1e-6


def test_weights_lie_on_eyes_and_mouth():
    weights = facial_feature_weights(112)
    assert weights.shape == (112, 112) and weights.mean() == pytest.approx(1)
    eye, mouth, cheek, corner = weights[51, 38], weights[92, 56], weights[75, 30], weights[2, 2]
    assert min(eye, mouth) > 2.5 * corner and cheek < 1.5 * corner
    assert torch.allclose(weights, weights.flip(1), atol=0.2)


def test_rows_are_drawn_in_proportion_to_their_weights():
    torch.manual_seed(0)
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0])
    first = torch.stack([draw_rows(weights, 1) for _ in range(2000)])
    assert torch.bincount(first.flatten(), minlength=4)[[0, 3]].sum() == 0
    assert (first == 2).float().mean() == pytest.approx(0.75, abs=0.03)
    # a fixed number: rows of weight 0 come last
    assert draw_rows(weights, 3)[:2].sort().values.tolist() == [1, 2]
    assert len(draw_rows(weights, 9)) == 4


def test_jittered_faces_stay_where_they_are():
    """Mirrored ones aside, by a few pixels; borders are not black."""
    face = torch.ones(64, 3, 64, 64)
    face[:, :, :, :32] = 0.5
    torch.manual_seed(0)
    moved = jitter(face)
    assert moved.shape == face.shape and moved.min() >= 0.5 - 1e-6
    left, right = moved[..., :26].mean(dim=(1, 2, 3)), moved[..., 38:].mean(dim=(1, 2, 3))
    mirrored = left > right
    assert 0.3 < mirrored.float().mean() < 0.7
    assert torch.allclose(torch.where(mirrored, right, left), torch.tensor(0.5), atol=1e-3)


def test_timesteps_of_logit_normal():
    """The share of timesteps below each decile is that of the distribution (Esser et al. 2024, eq. 19)."""
    torch.manual_seed(0)
    drawn = denoising.TIMESTEP_SAMPLING["logit_normal"](20_000, 1000, torch.device("cpu"))
    assert drawn.min() >= 0 and drawn.max() <= 999 and drawn.dtype == torch.int64
    for t in range(100, 1000, 100):
        z = (math.log(t / (1000 - t)) + 0.5) / 1.2
        assert (drawn < t).float().mean() == pytest.approx(0.5 * (1 + math.erf(z / 2**0.5)), abs=0.015)


def test_the_identity_loss_trains(workspace, toy_root):
    options = ("--prediction-type", "v_prediction", "--max-train-steps", "3", "--report-to", "tensorboard")
    options += ("--encoder-root", str(toy_root))
    for weight in ("0", "0.5"):
        result = train(workspace, f"identity_{weight}", *options, "--identity-weight", weight)
        assert result.returncode == 0, result.stderr
    first, second = (parameters(workspace / f"identity_{weight}") for weight in ("0", "0.5"))
    assert any(not torch.equal(first[name], second[name]) for name in first)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(workspace / "identity_0.5" / "logs" / "train"))
    events.Reload()
    assert -1 <= events.Scalars("identity_cosine")[-1].value <= 1
    result = train(workspace, "identity_epsilon", "--encoder-root", str(toy_root), "--identity-weight", "1")
    assert result.returncode == 2 and "--prediction-type v_prediction" in result.stderr


def test_compiled_training_gives_about_the_same_parameters(workspace, toy_root, backbone):
    """Denoiser, recognizer and LPIPS as accelerate is told to compile; here without code generation."""
    options = ("--prediction-type", "v_prediction", "--max-train-steps", "2", "--encoder-root", str(toy_root))
    options += ("--identity-weight", "0.5", "--decoded-samples", "2", "--learning-rate", "1e-4")
    result = train(workspace, "dynamo_no", *options)
    assert result.returncode == 0, result.stderr
    compiled = Running(
        "train", options_of(workspace, "dynamo_aot_eager", *options), ACCELERATE_DYNAMO_BACKEND="AOT_EAGER"
    )
    assert compiled.wait() == 0, compiled.written.decode()
    first, second = (parameters(workspace / f"dynamo_{backend}") for backend in ("no", "aot_eager"))
    assert first.keys() == second.keys()
    # Adam's first steps are as long as the learning rate, whatever the gradient
    assert max((first[name] - second[name]).abs().max() for name in first) < 5e-4


def test_balanced_sampling_gives_every_identity_its_share():
    identities = torch.tensor([0] * 90 + [1] * 9 + [2])
    weights = 1 / torch.bincount(identities)[identities].double()
    sampler = EndlessBatchSampler(100, 50, seed=0, weights=weights)
    batches = iter(sampler)
    counts = sum(torch.bincount(identities[next(batches)], minlength=3) for _ in range(60))
    assert counts.sum() == 3000 and (counts - 1000).abs().max() < 100
    # a resumed run draws the same
    resumed = iter(EndlessBatchSampler(100, 50, seed=0, start=60, weights=weights))
    assert next(resumed) == next(batches)


def pose_fixture() -> tuple[list[str], list[int], np.ndarray]:
    """Two caches of 100 and 60 faces, of 10 identities of 10 faces and of 2 of 50 and 10; 12 and 3 are side views."""
    names = [f"first/{face // 10}" for face in range(100)] + ["second/0"] * 50 + ["second/1"] * 10
    poses = np.zeros((160, 2), np.float32)
    poses[:12, 0], poses[[100, 101, 155], 0], poses[20, 0] = -0.3, 0.4, np.nan
    return names, [100, 60], poses


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("shares", [None, [3, 1]])
def test_side_views_get_their_share(balanced, shares):
    names, lengths, poses = pose_fixture()
    weights = sampling_weights(names, lengths, poses, balanced, shares, side_view_share=0.4).numpy()
    weights /= weights.sum()
    sideways = np.abs(poses[:, 0]) > 0.25
    assert weights[sideways].sum() == pytest.approx(0.4, abs=1e-3)
    if shares is not None:
        assert weights[:100].sum() == pytest.approx(0.75, abs=1e-3)
    # a product: of a cache and a pose, what an identity weighs is left as it was
    of_identity = np.ones(160) if not balanced else np.repeat([1 / 10, 1 / 50, 1 / 10], [100, 50, 10])
    factors = weights / of_identity
    for part in (slice(0, 100), slice(100, 160)):
        for group in (factors[part][sideways[part]], factors[part][~sideways[part]]):
            assert np.allclose(group, group[0])
    first, second = factors[[0, 50]], factors[[100, 120]]
    assert first[0] / first[1] == pytest.approx(second[0] / second[1])


def test_weights_without_side_views_are_as_before():
    names, lengths, poses = pose_fixture()
    assert sampling_weights(names, lengths) is None
    balanced = np.repeat([1 / 10, 1 / 50, 1 / 10], [100, 50, 10])
    assert np.array_equal(sampling_weights(names, lengths, balanced=True).numpy(), balanced)
    shares = sampling_weights(names, lengths, balanced=True, shares=[3, 1]).numpy()
    expected = np.concatenate([balanced[:100] * 0.75 / 10, balanced[100:] * 0.25 / 2])
    assert np.allclose(shares, expected, rtol=1e-12)
    none = sampling_weights(names, lengths, shares=[1, 0]).numpy()
    assert none[100:].max() == 0 and np.allclose(none[:100], 0.01)


def test_shares_that_the_faces_do_not_allow_are_refused():
    names, lengths, poses = pose_fixture()
    poses[100:, 0] = 0
    with pytest.raises(ValueError, match=r"\[1, 3\], --side-view-share 0.5\) .*\[100, 60\] faces with \[12, 0\] side"):
        sampling_weights(names, lengths, poses, shares=[1, 3], side_view_share=0.5)
    with pytest.raises(ValueError, match=r"with \[0, 0\] side views: choose others"):
        sampling_weights(names, lengths, np.zeros((160, 2)), side_view_share=0.1)


def test_side_view_share_trains(workspace, toy_photographs, tmp_path):
    """A cache of faces that look ahead and one of side views, which a detector of its own finds."""
    write_toy_pack(tmp_path, points=[(-2, -2), (2, -2), (1.5, 0), (-1.6, 2), (1.6, 2)])
    prepare_faces(toy_photographs, tmp_path / "side", FaceEncoder("toy", str(tmp_path), det_size=160), image_size=16)
    data = ("--train-data", str(workspace / "cache"), str(tmp_path / "side"), "--max-train-steps", "2")
    result = train(workspace, "side", *data, "--side-view-share", "0.3", "--balanced-sampling")
    assert result.returncode == 0, result.stderr
    (checkpoint,) = (workspace / "side").glob("checkpoint-*")
    assert json.loads((checkpoint / "training.json").read_text())["fixed"]["side_view_share"] == 0.3
    resume = ("--resume-from-checkpoint", "latest", "--side-view-share", "0.5", "--balanced-sampling")
    result = train(workspace, "side", *data, *resume)
    assert result.returncode != 0 and "side_view_share: 0.3 then, 0.5 now" in result.stderr

    args = train_script.parse_args(options_of(workspace, "side_weights", *data, "--side-view-share", "0.3"))
    caches = [FaceCache(folder) for folder in args.train_data]
    _, sampler, names, _ = train_script.load_training_data(args, caches, Accelerator(cpu=True), tiny_autoencoder())
    weights = sampler.weights
    assert len(names) == 48 and weights[24:].sum() / weights.sum() == pytest.approx(0.3)


def test_side_view_share_needs_poses(workspace, toy_root, tmp_path):
    (tmp_path / "a").mkdir()
    for index in range(4):
        PIL.Image.new("RGB", (112, 112), (0, 0, 255)).save(tmp_path / "a" / f"{index}.png")
    encoder = FaceEncoder("toy", str(toy_root), det_size=160)
    prepare_faces(tmp_path, workspace / "aligned", encoder, image_size=16, aligned=True)
    result = train(workspace, "no_poses", "--train-data", str(workspace / "aligned"), "--side-view-share", "0.3")
    assert result.returncode != 0 and "needs head poses, which these caches lack" in result.stderr
    assert not list((workspace / "aligned").glob("latents-*"))  # refused before anything is encoded


def test_denoiser_follows_the_context_it_is_told():
    torch.manual_seed(0)
    model = denoising.ConditionalDenoiser(
        UIFaceUNet2DModel(**TINY_UNET), IdentityProjector(16, 32), EmptyContext(32)
    ).eval()
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([5, 900])
    with torch.no_grad():
        first, second = (model(noisy, timesteps, torch.randn(2, 16), torch.tensor([True, False])) for _ in range(2))
    assert torch.equal(first[0], second[0]) and not torch.allclose(first[1], second[1])


@pytest.mark.parametrize(
    "options",
    [
        ("--mixed-precision", "bf16"),
        ("--gradient-checkpointing", "--channels-last"),
        ("--prediction-type", "v_prediction", "--snr-gamma", "5", "--lr-scheduler", "cosine", "--max-grad-norm", "1"),
    ],
)
def test_options_train_and_save(workspace, options):
    result = train(workspace, "options_" + options[0].strip("-"), *options, "--max-train-steps", "2")
    assert result.returncode == 0, result.stderr
    pipe = UIFacePipeline.from_pretrained(workspace / ("options_" + options[0].strip("-")))
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_twenty_steps_twice_are_forty(workspace):
    """Two workers, balanced identities, clipped gradients, several epochs."""
    options = ("--dataloader-num-workers", "2", "--balanced-sampling", "--max-grad-norm", "1")
    options += ("--checkpointing-steps", "20", "--gradient-accumulation-steps", "2")
    for steps in ("20", "40"):
        result = train(workspace, "halves", *options, "--max-train-steps", steps, "--resume-from-checkpoint", "latest")
        assert result.returncode == 0, result.stderr
    result = train(workspace, "forty", *options, "--max-train-steps", "40")
    assert result.returncode == 0, result.stderr
    assert_equal_parameters(workspace / "halves", workspace / "forty")


def test_starts_from_a_pipeline(uninterrupted, workspace):
    """With a learning rate of zero nothing changes: neither components nor first stage nor the call's defaults."""
    pipe = UIFacePipeline.from_pretrained(uninterrupted)
    own = {"guidance_scale": 1.5, "boundary_threshold": 0.01, "latest_boundary": 300, "injection_strength": 0.25}
    UIFacePipeline(**pipe.components, **own).save_pretrained(workspace / "start")
    options = ("--init-from", str(workspace / "start"), "--vae", "", "--unet", "{}", "--max-train-steps", "2")
    result = train(workspace, "from", *options, "--learning-rate", "0")
    assert result.returncode == 0, result.stderr
    assert_equal_parameters(workspace / "from", uninterrupted, "[!c]*")
    assert UIFacePipeline.from_pretrained(workspace / "from").default_sampling() == own
    result = train(workspace, "from_other", *options, "--prediction-type", "v_prediction")
    assert result.returncode != 0 and "'prediction_type': 'epsilon'" in result.stderr


def test_snapshots_and_validation_cosine(workspace, toy_root):
    """The cosine in the log is that of the pictures in the grid."""
    options = (
        "--snapshot-steps",
        "2",
        "--max-train-steps",
        "4",
        "--validation-steps",
        "4",
        "--report-to",
        "tensorboard",
    )
    options += ("--validation-inference-steps", "2", "--validation-seeds", "3")
    result = train(workspace, "snapshots", *options, "--encoder-root", str(toy_root))
    assert result.returncode == 0, result.stderr
    folder = workspace / "snapshots"
    assert_equal_parameters(folder / "step-0000004", folder, "[!cs]*")
    UIFacePipeline.from_pretrained(folder / "step-0000002")
    facts = json.loads((folder / "step-0000002" / "progress.json").read_text())
    assert facts["step"] == 2 and facts["samples"] == 8 and 0 <= facts["hours"] < 1
    # a kill between checkpoint and snapshot
    shutil.rmtree(folder / "step-0000004")
    shutil.move(folder / "validation" / "step-0000004.png", folder / "grid.png")
    result = train(workspace, "snapshots", *options, "--resume-from-checkpoint", "latest", "--report-to", "none")
    assert result.returncode == 0, result.stderr
    assert_equal_parameters(folder / "step-0000004", folder, "[!cs]*")
    assert (folder / "grid.png").read_bytes() == (folder / "validation" / "step-0000004.png").read_bytes()

    for name in ("loss", "loss/quarter_1", "loss/empty"):
        assert scalars(folder / "logs" / "train", name)
    (logged,) = scalars(folder / "logs" / "train", "validation/cosine")
    grid = PIL.Image.open(folder / "validation" / "step-0000004.png")
    cells = [grid.crop((16 * x, 16 * y, 16 * x + 16, 16 * y + 16)) for y in (1, 2) for x in range(3)]
    embeddings = FaceEncoder("toy", str(toy_root), det_size=160).embed_pictures(cells)
    bank = FaceCache(workspace / "cache").embeddings()
    people = bank.embeddings[[0, 6]].repeat_interleave(3, dim=0)
    assert logged.value == pytest.approx((embeddings * people).sum(dim=1).mean().item(), abs=1e-5)


def test_pushes_at_checkpoints_and_survives_a_failed_upload(workspace, tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        hub.fail_uploads = 1
        options = ("--push-to-hub", "--hub-model-id", "tester/trained", "--hub-private", "--license", "mit")
        run = command(workspace, "pushed", *options, "--max-train-steps", "8", "--checkpointing-steps", "4")
        env = {**environment(), **hub.environment(tmp_path / "home")}
        result = subprocess.run(run, capture_output=True, text=True, env=env)
        assert result.returncode == 0, result.stderr
        assert "tester/trained was not pushed to the Hub; the training goes on." in result.stderr
        assert hub.repositories["tester/trained"].private
        files = hub.files("tester/trained")
        assert not [name for name in files if "checkpoint" in name or name.endswith((".pkl", ".bin", ".pt"))]
        pushed = hub.read("tester/trained", "unet/diffusion_pytorch_model.safetensors")
        assert pushed == (workspace / "pushed" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        card = hub.read("tester/trained", "README.md").decode()
        assert "license: mit" in card and "train_batch_size: 4" in card and str(workspace) not in card
        # the folder has the same card, by which a data set tells what its generator was trained on
        lineage = read_header(workspace / "pushed" / "README.md")["lineage"]
        cache = FaceCache(workspace / "cache")
        about = {"name": "cache", "faces": len(cache), "fingerprint": cache.fingerprint}
        assert lineage["training_data"] == [about] and lineage["encoder"]["name"] == "toy"
        assert ModelCard(card).data.to_dict()["lineage"] == lineage


def test_reports_to_wandb(workspace, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(workspace))
    options = ("--report-to", "wandb", "--max-train-steps", "2", "--validation-steps", "2")
    result = train(workspace, "wandb_run", *options, "--validation-inference-steps", "2")
    assert result.returncode == 0, result.stderr
    assert len(list((workspace / "wandb").glob("offline-run-*/*.wandb"))) == 1


def test_a_time_limit_saves_and_stops(workspace):
    result = train(workspace, "limit", "--max-train-hours", "0")
    assert result.returncode == 0, result.stderr
    assert [p.name for p in (workspace / "limit").glob("checkpoint*")] == ["checkpoint-1"]
    UIFacePipeline.from_pretrained(workspace / "limit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resume-from-checkpoint", "nowhere"), "nowhere is no checkpoint"),
        (("--unet", '{"block_out_channels": [32], "attention_levels": []}'), "`attention_levels` has 0 entries"),
        (("--train-data", "nowhere"), "no cache of prepared faces"),
        (("--train-batch-size", "64"), "24 faces do not fill 1 batch(es) of 64: lower --train-batch-size"),
        (("--checkpointing-steps", "0"), "--checkpointing-steps: '0' is not a whole number from 1 on"),
        (("--config", "nowhere.yaml"), "--config nowhere.yaml cannot be read"),
    ],
)
def test_bad_input_is_named(workspace, options, message):
    result = train(workspace, "bad", *options)
    assert result.returncode != 0 and message in result.stderr


def test_two_trainings_do_not_share_a_folder(workspace):
    (workspace / "locked").mkdir()
    with FileLock(workspace / "locked" / ".lock"):
        result = train(workspace, "locked")
    assert result.returncode != 0 and "another training works in" in result.stderr
    result = train(workspace, "locked", "--max-train-steps", "1")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "go on with --resume-from-checkpoint latest"),
        (("--resume-from-checkpoint", "latest", "--seed", "3"), "seed: 0 then, 3 now"),
        (("--resume-from-checkpoint", "latest", "--learning-rate", "1"), "learning_rate: 0.001 then, 1.0 now"),
        (("--resume-from-checkpoint", "latest", "--lr-restart-steps", "7"), "lr_restart_steps: 10000 then, 7 now"),
        (("--resume-from-checkpoint", "latest", "--lr-restart-factor", "3"), "lr_restart_factor: 2 then, 3 now"),
        (
            ("--resume-from-checkpoint", "latest", "--lr-scheduler", "cosine"),
            "lr_scheduler: cosine_warm_restarts then",
        ),
        (("--resume-from-checkpoint", "latest", "--train-data", "OTHER"), "train_data: "),
    ],
)
def test_an_earlier_training_is_not_overwritten(uninterrupted, workspace, toy_root, toy_photographs, options, message):
    before = sorted(p.name for p in uninterrupted.iterdir())
    if "OTHER" in options:  # a cache with as many faces
        for person in toy_photographs.iterdir():
            for index, file in enumerate(sorted(person.iterdir())):
                target = workspace / "photographs" / person.name / f"{index + 1}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        encoder = FaceEncoder("toy", str(toy_root), det_size=160)
        prepare_faces(workspace / "photographs", workspace / "other", encoder, image_size=16)
        options = (*options[:-1], str(workspace / "other"))
    result = train(workspace, "whole", *options)
    assert result.returncode != 0 and message in result.stderr
    assert sorted(p.name for p in uninterrupted.iterdir()) == before


@pytest.mark.parametrize("entry", ["learning_rat: 1", "prediction_type: velocity", "train_batch_size: many"])
def test_recipes_are_checked_as_the_command_line(workspace, entry):
    (workspace / "typo.yaml").write_text(entry + "\n")
    result = train(workspace, "typo", "--config", str(workspace / "typo.yaml"))
    name = entry.split(":")[0]
    assert result.returncode == 2 and (name in result.stderr or f"--{name.replace('_', '-')}:" in result.stderr)
