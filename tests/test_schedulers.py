"""Every scheduler of diffusers: right, or refused by name."""

import inspect
import math

import diffusers.schedulers
import numpy as np
import pytest
import torch
from conftest import BETAS, TINY_UNET, tiny_components
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

from uiface_diffusers import UIFacePipeline, UIFaceUNet2DModel
from uiface_diffusers.two_stage.schedulers import FLOW, REFUSED, SUPPORTED

# those of flow matching alone are in test_flow.py
SCHEDULERS = sorted(
    name
    for name in dir(diffusers.schedulers)
    if name.endswith("Scheduler") and (name in SUPPORTED or name not in FLOW)
)
STOCHASTIC = (
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "SASolverScheduler",
)
# latents of an identity, and those of nobody, are distributed normally about these means
IDENTITY_MEAN = torch.tensor([0.3, -0.2, 0.5, 0.0], dtype=torch.float64).reshape(1, 4, 1, 1)
EMPTY_MEAN = torch.tensor([-0.5, 0.4, 0.1, 1.0], dtype=torch.float64).reshape(1, 4, 1, 1)
DEVIATION = 0.6
LOG_SIGMAS = (DDIMScheduler(**BETAS).alphas_cumprod.double().reciprocal() - 1).log().numpy() / 2


def noise_level(timestep: float) -> tuple[float, float]:
    """Factor of the latents and of the noise, between whole timesteps as diffusers' sigmas are interpolated."""
    sigma = math.exp(np.interp(timestep, np.arange(1000), LOG_SIGMAS))
    return 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)


def standardized(latents: torch.Tensor, timestep: float, mean: torch.Tensor) -> torch.Tensor:
    """Along the probability flow of a normal distribution, this does not change."""
    alpha, sigma = noise_level(timestep)
    return (latents.double() - alpha * mean) / math.sqrt((alpha * DEVIATION) ** 2 + sigma**2)


class ExactUNet(UIFaceUNet2DModel):
    """Predicts the noise as no network can do better."""

    def forward(self, sample, timestep, encoder_hidden_states, cross_attention_kwargs=None, return_dict=True):
        alpha, sigma = noise_level(float(timestep))
        is_empty = (encoder_hidden_states == self.empty).flatten(1).all(dim=1)[:, None, None, None]
        mean = torch.where(is_empty, EMPTY_MEAN, IDENTITY_MEAN)
        noise = sigma * (sample.double() - alpha * mean) / ((alpha * DEVIATION) ** 2 + sigma**2)
        return (noise.to(sample.dtype),)


def make_exact_pipeline() -> UIFacePipeline:
    components = tiny_components() | {"unet": ExactUNet(**TINY_UNET)}
    components["unet"].empty = components["empty_context"](1).context.detach()
    pipe = UIFacePipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def exact_pipeline() -> UIFacePipeline:
    return make_exact_pipeline()


def make_scheduler(name: str, **options):
    cls = getattr(diffusers.schedulers, name)
    known = inspect.signature(cls.__init__).parameters
    return cls(**{key: value for key, value in {**BETAS, "clip_sample": False, **options}.items() if key in known})


NOISE = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def sample(pipe, **options):
    call = {"num_inference_steps": 50, "guidance_scale": 1.0, "output_type": "latent", "latents": NOISE}
    generator = torch.Generator().manual_seed(1)
    return pipe(torch.ones(16), num_images_per_prompt=64, generator=generator, **call | options)


def error_of(pipe, scheduler, is_stochastic: bool) -> tuple[float, float]:
    """Root mean square distance from the exact solution, of its deviation, and 0. Of a stochastic scheduler, how far
    its samples' deviation is from that of the distribution, and their mean."""
    pipe.scheduler = scheduler
    latents = sample(pipe, boundary=None, num_inference_steps=100 if is_stochastic else 50).images
    if is_stochastic:
        result = standardized(latents, -1e9, IDENTITY_MEAN)
        return abs(result.std().item() - 1), result.mean(dim=(0, 2, 3)).abs().max().item()
    start = float(scheduler.timesteps[0])
    exact = IDENTITY_MEAN + DEVIATION * standardized(NOISE, start, IDENTITY_MEAN)
    return (latents - exact).square().mean().sqrt().item() / DEVIATION, 0.0


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_is_right_or_refused(exact_pipeline, name):
    """Right: its samples are those of the exact solution, or, of a stochastic one, of the distribution."""
    if name not in SUPPORTED:
        cls = getattr(diffusers.schedulers, name)
        exact_pipeline.scheduler = object.__new__(cls)  # several need arguments of their own
        with pytest.raises(ValueError, match=rf"`scheduler` is {name}: .*DDIMScheduler.*PNDMScheduler") as error:
            sample(exact_pipeline)
        assert REFUSED[name] in str(error.value)
        return
    error, of_mean = error_of(exact_pipeline, make_scheduler(name), name in STOCHASTIC)
    assert error <= (0.07 if name in STOCHASTIC else 0.06) and of_mean <= 0.05


@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in STOCHASTIC])
def test_a_change_of_contexts_is_right(exact_pipeline, name):
    """Against the exact solution under the empty context to the boundary, and under the identity's from there."""
    exact_pipeline.scheduler = make_scheduler(name)
    out = sample(exact_pipeline, boundary=500, injection=None)
    start, switch = float(exact_pipeline.scheduler.timesteps[0]), out.boundary_timesteps.unique().item()
    assert 480 <= switch <= 500
    alpha, sigma = noise_level(switch)
    at_switch = standardized(NOISE, start, EMPTY_MEAN) * math.sqrt((alpha * DEVIATION) ** 2 + sigma**2)
    exact = IDENTITY_MEAN + DEVIATION * standardized(at_switch + alpha * EMPTY_MEAN, switch, IDENTITY_MEAN)
    error = (out.images - exact).square().mean().sqrt()
    assert error <= 0.12 * DEVIATION
    assert (out.images - sample(exact_pipeline, boundary=None).images).square().mean().sqrt() > 3 * error


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(**BETAS, prediction_type="sample"), "DDIMScheduler has prediction_type='sample'"),
        (
            EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction", timestep_type="continuous"),
            "EulerDiscreteScheduler has timestep_type='continuous'",
        ),
        (DPMSolverMultistepScheduler(**BETAS, use_flow_sigmas=True), "use_flow_sigmas=True"),
        (
            UniPCMultistepScheduler(**BETAS, prediction_type="flow_prediction"),
            "prediction_type='flow_prediction'",
        ),
    ],
)
def test_configurations_of_another_kind_of_denoiser_are_refused(exact_pipeline, scheduler, message):
    exact_pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        sample(exact_pipeline)


def test_timesteps_that_the_denoiser_does_not_know_are_refused(exact_pipeline):
    class Shifted(DDIMScheduler):
        def set_timesteps(self, *args, **options):
            super().set_timesteps(*args, **options)
            self.timesteps = self.timesteps + 500

    exact_pipeline.scheduler = Shifted(**BETAS)
    with pytest.raises(ValueError, match="timesteps of Shifted go from 1480 to 500: .* within 999 and 0"):
        sample(exact_pipeline)


def test_subclasses_and_other_spacings_are_taken(exact_pipeline):
    class Own(DDIMScheduler):
        pass

    exact_pipeline.scheduler = Own(**BETAS, clip_sample=False)
    assert sample(exact_pipeline, boundary=500, num_inference_steps=2).images.isfinite().all()
    for options in ({"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}, {"use_exponential_sigmas": True}):
        exact_pipeline.scheduler = make_scheduler("DPMSolverMultistepScheduler", **options)
        assert sample(exact_pipeline, boundary=500, num_inference_steps=5).images.isfinite().all()


@pytest.mark.parametrize("steps", [3, 4, 10])
def test_few_steps_of_an_ancestral_scheduler(exact_pipeline, steps):
    """Interpolated timesteps rise by a rounding error; with two steps, one is NaN."""
    exact_pipeline.scheduler = make_scheduler("KDPM2AncestralDiscreteScheduler")
    assert sample(exact_pipeline, boundary=None, num_inference_steps=steps).images.isfinite().all()
    with pytest.raises(ValueError, match="3 timesteps of KDPM2AncestralDiscreteScheduler are too few: one is"):
        sample(exact_pipeline, num_inference_steps=2)
