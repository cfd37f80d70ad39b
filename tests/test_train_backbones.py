"""Training of a transformer, and with flow matching."""

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from tiny_training import Oracle, train, write_workspace

from uiface_diffusers import UIFacePipeline
from uiface_diffusers.training.denoising import DenoisingLog, denoising_loss
from uiface_diffusers.training.objectives import (
    OBJECTIVES,
    FlowPrediction,
    new_sampler,
    objective_of,
    training_scheduler,
)

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "cross_attention_dim": 32,
    "patch_size": 1,
}
PIXART = ("--denoiser", "pixart", "--unet", "{}", "--transformer", json.dumps(SMALL))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, toy_root, toy_photographs):
    return write_workspace(tmp_path_factory.mktemp("train"), toy_root, toy_photographs)


@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_a_transformer_learns(workspace, prediction, monkeypatch):
    """A hundred steps with every prediction. What is saved samples, and goes on."""
    means, take = [], DenoisingLog.take

    def keep(log, accelerator):
        logs, finite = take(log, accelerator)
        means.append(logs["loss"])
        return logs, finite

    monkeypatch.setattr(DenoisingLog, "take", keep)
    steps = ("--max-train-steps", "100", "--logging-steps", "20", "--checkpointing-steps", "100")
    folder = workspace / prediction
    result = train(workspace, prediction, *PIXART, *steps, "--prediction-type", prediction)
    assert result.returncode == 0, result.stderr
    assert len(means) == 5 and means[-1] < 0.8 * means[0]
    pipe = UIFacePipeline.from_pretrained(folder)
    assert isinstance(pipe.unet, PixArtTransformer2DModel) and pipe.identity_projector.config.num_tokens == 8
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler) == (prediction == "flow_prediction")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(np.eye(16, dtype=np.float32)[:2], num_inference_steps=4, output_type="np").images
    assert images.shape == (2, 16, 16, 3) and np.isfinite(images).all()
    # goes on from there
    more = ("--init-from", str(folder), "--prediction-type", prediction, "--max-train-steps", "1", "--unet", "{}")
    result = train(workspace, f"{prediction}-more", *more)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--denoiser", "pixart"), "--unet has options of another network than --denoiser pixart"),
        ((*PIXART[:4], "--transformer", '{"layers": 1}'), '--transformer {"layers": 1} makes no network'),
        ((*PIXART[:4], "--transformer", '{"out_channels": 8}'), "learned variances are not supported"),
        ((*PIXART[:4], "--transformer", '{"norm_type": "ada_norm_zero"}'), "makes no network"),
    ],
)
def test_wrong_options_of_a_transformer_are_refused(workspace, options, message):
    result = train(workspace, "wrong", *options)
    assert result.returncode != 0 and message in result.stderr


def test_objective_of_flow_matching():
    """The loss is zero for the right prediction, and the mean square of the error otherwise."""
    scheduler = training_scheduler(new_sampler("flow_prediction"))
    assert isinstance(objective_of(scheduler), FlowPrediction)
    face = torch.randn(1, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    latents, embeds = face.expand(512, 2, -1, -1, -1).contiguous(), torch.randn(512, 8)

    def right(noisy, timesteps):
        level = timesteps[:, None, None, None] / 1000
        return (noisy - face[0]) / level  # noise - x_0, of noisy = x_0 + level (noise - x_0)

    for error, snr_gamma in ((0.0, None), (0.5, None), (0.5, 5.0)):
        torch.manual_seed(1)
        oracle = Oracle(lambda *args, error=error: right(*args) + error)
        loss = denoising_loss(oracle, scheduler, latents, embeds, 0.2, snr_gamma)
        times = oracle.asked["timesteps"]
        assert times.min() >= 1 and times.max() <= 1000 and (times - 1 == loss.timesteps).all()
        level = times / 1000
        # an error of the velocity is s times as large on the clean latents, which min-SNR weighs by min(snr, gamma)
        weight = (
            torch.ones(512) if snr_gamma is None else level**2 * ((1 - level) / level).square().clamp(max=snr_gamma)
        )
        assert torch.allclose(loss.losses, error**2 * weight, atol=1e-4)
        off = (loss.denoised - face[0]).abs().amax(dim=(1, 2, 3))
        assert torch.allclose(off, error * level, atol=1e-4)


def test_noisy_latents_are_those_that_the_sampler_expects():
    """The mixture at a noise level, and the timestep that the denoiser is given for it."""
    sampler = new_sampler("flow_prediction")
    objective = objective_of(training_scheduler(sampler))
    latents, noise = torch.randn(2, 3, 4, 4, 4).unbind()
    index = torch.tensor([999, 499, 0])
    noisy = objective.noisy(latents, noise, index)
    assert torch.allclose(noisy, sampler.scale_noise(latents, objective.denoiser_timesteps(index).float(), noise))
    assert torch.equal(noisy[0], noise[0])
    assert torch.allclose(objective.signal(index), torch.tensor([0.0, 0.5, 1.0]), atol=1e-5)
