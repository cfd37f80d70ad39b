"""Every scheduler of diffusers: right, or refused by name."""

import math

import diffusers.schedulers
import pytest
from conftest import BETAS
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from exact_denoisers import DEVIATION, EMPTY_MEAN, IDENTITY_MEAN, NOISE, make_exact_pipeline, sample_exactly
from exact_diffusion import STOCHASTIC, best_noise, make_scheduler, noise_level, standardized

from uiface_diffusers import UIFacePipeline
from uiface_diffusers.two_stage.schedulers import FLOW, REFUSED, SUPPORTED

# those of flow matching alone are in test_flow.py
SCHEDULERS = sorted(
    name
    for name in dir(diffusers.schedulers)
    if name.endswith("Scheduler") and (name in SUPPORTED or name not in FLOW)
)


@pytest.fixture(scope="module")
def exact_pipeline() -> UIFacePipeline:
    return make_exact_pipeline(best_noise)


def error_of(pipe, scheduler, is_stochastic: bool) -> tuple[float, float]:
    """Root mean square distance from the exact solution, of its deviation, and 0. Of a stochastic scheduler, how far
    its samples' deviation is from that of the distribution, and their mean."""
    pipe.scheduler = scheduler
    latents = sample_exactly(pipe, boundary=None, num_inference_steps=100 if is_stochastic else 50).images
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
            sample_exactly(exact_pipeline)
        assert REFUSED[name] in str(error.value)
        return
    error, of_mean = error_of(exact_pipeline, make_scheduler(name), name in STOCHASTIC)
    assert error <= (0.07 if name in STOCHASTIC else 0.06) and of_mean <= 0.05


@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in STOCHASTIC])
def test_a_change_of_contexts_is_right(exact_pipeline, name):
    """Against the exact solution under the empty context to the boundary, and under the identity's from there."""
    exact_pipeline.scheduler = make_scheduler(name)
    out = sample_exactly(exact_pipeline, boundary=500, injection=None)
    start, switch = float(exact_pipeline.scheduler.timesteps[0]), out.boundary_timesteps.unique().item()
    assert 480 <= switch <= 500
    alpha, sigma = noise_level(switch)
    at_switch = standardized(NOISE, start, EMPTY_MEAN) * math.sqrt((alpha * DEVIATION) ** 2 + sigma**2)
    exact = IDENTITY_MEAN + DEVIATION * standardized(at_switch + alpha * EMPTY_MEAN, switch, IDENTITY_MEAN)
    error = (out.images - exact).square().mean().sqrt()
    assert error <= 0.12 * DEVIATION
    assert (out.images - sample_exactly(exact_pipeline, boundary=None).images).square().mean().sqrt() > 3 * error


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
        sample_exactly(exact_pipeline)


def test_timesteps_that_the_denoiser_does_not_know_are_refused(exact_pipeline):
    class Shifted(DDIMScheduler):
        def set_timesteps(self, *args, **options):
            super().set_timesteps(*args, **options)
            self.timesteps = self.timesteps + 500

    exact_pipeline.scheduler = Shifted(**BETAS)
    with pytest.raises(ValueError, match="timesteps of Shifted go from 1480 to 500: .* within 999 and 0"):
        sample_exactly(exact_pipeline)


def test_subclasses_and_other_spacings_are_taken(exact_pipeline):
    class Own(DDIMScheduler):
        pass

    exact_pipeline.scheduler = Own(**BETAS, clip_sample=False)
    assert sample_exactly(exact_pipeline, boundary=500, num_inference_steps=2).images.isfinite().all()
    for options in ({"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}, {"use_exponential_sigmas": True}):
        exact_pipeline.scheduler = make_scheduler("DPMSolverMultistepScheduler", **options)
        assert sample_exactly(exact_pipeline, boundary=500, num_inference_steps=5).images.isfinite().all()


@pytest.mark.parametrize("steps", [3, 4, 10])
def test_few_steps_of_an_ancestral_scheduler(exact_pipeline, steps):
    """Interpolated timesteps rise by a rounding error; with two steps, one is NaN."""
    exact_pipeline.scheduler = make_scheduler("KDPM2AncestralDiscreteScheduler")
    assert sample_exactly(exact_pipeline, boundary=None, num_inference_steps=steps).images.isfinite().all()
    with pytest.raises(ValueError, match="3 timesteps of KDPM2AncestralDiscreteScheduler are too few: one is"):
        sample_exactly(exact_pipeline, num_inference_steps=2)
