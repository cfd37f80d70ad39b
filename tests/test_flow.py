"""Flow matching: its schedulers against the velocity field integrated by hand, and noise levels under any schedule."""

import math

import numpy as np
import pytest
import torch
from conftest import BETAS, DDIM, max_difference
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from exact_denoisers import DEVIATION, EMPTY_MEAN, IDENTITY_MEAN, NOISE, make_exact_pipeline
from exact_flow import VELOCITY, best_velocity, flow_level, make_scheduler, sample, standardized, velocity

from uiface_diffusers import UIFacePipeline
from uiface_diffusers.two_stage.schedulers import FLOW, paper_timesteps, scheduler_like


@pytest.fixture(scope="module")
def exact_pipeline() -> UIFacePipeline:
    return make_exact_pipeline(best_velocity)


def euler(sigmas, boundary: float, guidance_scale: float) -> torch.Tensor:
    """The velocity field, integrated by hand: the empty context's to the noise level `boundary`, guided from there."""
    latents = NOISE.double()
    for s, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        empty, identity = (velocity(latents, s, mean) for mean in (EMPTY_MEAN, IDENTITY_MEAN))
        prediction = empty if s > boundary else empty + guidance_scale * (identity - empty)
        latents = latents + (following - s) * prediction
    return latents


def test_the_papers_timestep_500_is_a_flows_noise_level_of_0_775():
    assert flow_level(500) == pytest.approx(0.7746, abs=1e-3)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, flow_level(800), flow_level(500), flow_level(7), 0.0001])
    assert paper_timesteps(scheduler) == [999, 800, 500, 7, 0]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_euler_is_the_velocity_integrated_by_hand(exact_pipeline, shift, guidance_scale):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    call = {"boundary": 500, "latest_boundary": 501, "guidance_scale": guidance_scale, "num_inference_steps": 20}
    out = sample(exact_pipeline, scheduler, **call)
    sigmas = np.linspace(scheduler.sigma_max, scheduler.sigma_min, 20)
    sigmas = [*(shift * sigmas / (1 + (shift - 1) * sigmas)), 0.0]
    assert max_difference(out.images, euler(sigmas, flow_level(500), guidance_scale)) <= 1e-5
    # the first noise level at or below that of the boundary
    first = max(s for s in sigmas if s <= flow_level(500))
    assert abs(flow_level(int(out.boundary_timesteps[0])) - first) < 2e-3


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("cls", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_multistep_schedulers_of_first_order_are_eulers(exact_pipeline, cls, shift):
    """With a single step of history, they solve along straight paths exactly as Euler's method does."""
    options = {"disable_corrector": list(range(20))} if cls is UniPCMultistepScheduler else {}
    scheduler = cls(solver_order=1, flow_shift=shift, **VELOCITY, **options)
    call = {"boundary": 500, "latest_boundary": 501, "guidance_scale": 2.0, "num_inference_steps": 20}
    out = sample(exact_pipeline, scheduler, **call)
    sigmas = scheduler.sigmas.double().tolist()
    assert len(sigmas) == 21 and sigmas[0] >= 0.998 and sigmas[-1] == 0
    assert max_difference(out.images, euler(sigmas, flow_level(500), 2.0)) <= 1e-5


def error_of(single: torch.Tensor) -> float:
    """Root mean square distance of a single stage's samples from the exact solution, of its deviation."""
    exact = IDENTITY_MEAN + DEVIATION * standardized(NOISE, 1.0, IDENTITY_MEAN)
    return (single - exact).square().mean().sqrt().item() / DEVIATION


@pytest.mark.parametrize("name", FLOW)
def test_every_flow_scheduler_is_right(exact_pipeline, name):
    """Against the exact solution: under one context, and with a change of contexts on the way."""
    scheduler = make_scheduler(name)
    single = sample(exact_pipeline, scheduler, boundary=None).images
    switched = sample(exact_pipeline, scheduler, boundary=500)
    assert error_of(single) <= 0.06
    levels = scheduler.sigmas[:-1].double()
    switch = levels[levels <= flow_level(500) + 1e-4][0].item()
    at_switch = standardized(NOISE, 1.0, EMPTY_MEAN) * math.sqrt(((1 - switch) * DEVIATION) ** 2 + switch**2)
    at_switch = at_switch + (1 - switch) * EMPTY_MEAN
    exact = IDENTITY_MEAN + DEVIATION * standardized(at_switch, switch, IDENTITY_MEAN)
    error = (switched.images - exact).square().mean().sqrt()
    assert error <= 0.12 * DEVIATION
    assert (switched.images - single).square().mean().sqrt() > 3 * error


# --- noise levels ----------------------------------------------------------------------------------------------------


class OfEqualNoise(FlowMatchEulerDiscreteScheduler):
    """Flow matching at the noise levels of the paper's sampler."""

    def set_timesteps(self, num_inference_steps):
        paper = DDIMScheduler(**BETAS, **DDIM)
        paper.set_timesteps(num_inference_steps)
        super().set_timesteps(sigmas=[flow_level(int(t)) for t in paper.timesteps])


class ScaledLinearOfEqualNoise(EulerDiscreteScheduler):
    """Stable Diffusion's betas, which end at less noise, at the noise levels of the paper's sampler: its timesteps are
    between whole ones."""

    def __init__(self):
        super().__init__(1000, 0.00085, 0.012, "scaled_linear")

    def set_timesteps(self, num_inference_steps):
        paper = DDIMScheduler(**BETAS, **DDIM)
        paper.set_timesteps(num_inference_steps)
        levels = np.array([flow_level(int(t)) for t in paper.timesteps if t < 720])
        noise, alphas = levels / (1 - levels), self.alphas_cumprod.double()
        own = ((1 - alphas) / alphas).sqrt().log().numpy()
        super().set_timesteps(len(noise))
        self.timesteps = torch.tensor(np.interp(np.log(noise), own, np.arange(1000)))
        self.sigmas = torch.tensor([*noise, 0.0])


def rows_of_steps(pipe, scheduler, **options) -> tuple[list[int], list[int]]:
    rows, pipe.scheduler = [], scheduler
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    out = pipe(torch.eye(2, 16), num_inference_steps=20, latents=latents, output_type="latent", **options)
    hook.remove()
    return rows, out.boundary_timesteps.tolist()


OPTIONS = [
    {"boundary": 500},
    {"boundary": 499, "latest_boundary": 300},
    {"boundary": 50},
    {"boundary": 600, "latest_boundary": 450, "injection": None},
    {"boundary": 700, "guidance_interval": (200, 600)},
    {"boundary_threshold": -1.0, "latest_boundary": 400},
    {"boundary": 600, "reuse_empty_branch": 2},
]


@pytest.mark.parametrize("scheduler", [OfEqualNoise, ScaledLinearOfEqualNoise])
@pytest.mark.parametrize("options", OPTIONS)
def test_boundary_cap_and_interval_are_at_equal_noise(tiny_pipeline, scheduler, options):
    """Each step has the rows, and each sample the boundary, that they have under the paper's schedule."""
    rows, boundaries = rows_of_steps(tiny_pipeline, DDIMScheduler(**BETAS, **DDIM), **options)
    ours, own_boundaries = rows_of_steps(tiny_pipeline, scheduler(), **options)
    # 700, 650, ..., 0 of Stable Diffusion's
    assert len(ours) == (20 if scheduler is OfEqualNoise else 15)
    assert len(set(rows)) > 1 and ours == rows[-len(ours) :] and own_boundaries == boundaries


def test_timesteps_of_the_papers_schedule_are_as_they_are():
    for cls in (DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler):
        scheduler = cls(**BETAS)
        scheduler.set_timesteps(7)
        assert paper_timesteps(scheduler) == scheduler.timesteps.double().tolist()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "use_dynamic_shifting=True, .*fixed shift",
        ),
        (lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling=True"),
        (lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "they have to fall within 1000 and 0"),
        (
            lambda: FlowMatchEulerDiscreteScheduler.from_config(DDIMScheduler(prediction_type="epsilon").config),
            "FlowMatchEulerDiscreteScheduler has prediction_type='epsilon'",
        ),
        (
            lambda: DDIMScheduler.from_config(dict(FlowMatchEulerDiscreteScheduler(invert_sigmas=False).config)),
            "DDIMScheduler was made from the configuration of a flow-matching scheduler",
        ),
        (lambda: DDIMScheduler(prediction_type="flow_prediction"), "which it cannot sample. These can: .*UniPC"),
        (
            lambda: UniPCMultistepScheduler(prediction_type="flow_prediction"),
            "prediction_type='flow_prediction' without use_flow_sigmas=True",
        ),
        (lambda: UniPCMultistepScheduler(**VELOCITY, predict_x0=False), "predict_x0=False"),
        (
            lambda: UniPCMultistepScheduler(**VELOCITY, final_sigmas_type="sigma_min"),
            "ends at the noise level 0.0.*: it has to end at 0",
        ),
        (
            lambda: DPMSolverMultistepScheduler(**VELOCITY, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
            "algorithm_type='dpmsolver'",
        ),
        (
            lambda: DPMSolverMultistepScheduler(**VELOCITY, use_karras_sigmas=True),
            "timesteps of DPMSolverMultistepScheduler are not its noise levels",
        ),
    ],
)
def test_what_flow_matching_is_not_sampled_with_is_refused(exact_pipeline, scheduler, message):
    with pytest.raises(ValueError, match=message):
        sample(exact_pipeline, scheduler())


def test_a_scheduler_is_exchanged_for_another(exact_pipeline):
    """As `uiface generate --scheduler` does: there and back, with its shift; one that samples no flow is refused."""
    first = FlowMatchEulerDiscreteScheduler(shift=3.0)
    unipc = scheduler_like(UniPCMultistepScheduler, first)
    back = scheduler_like(FlowMatchEulerDiscreteScheduler, unipc)
    assert (unipc.config.flow_shift, back.config.shift) == (3.0, 3.0)
    expected = sample(exact_pipeline, first, boundary=None).images
    assert torch.equal(sample(exact_pipeline, back, boundary=None).images, expected)
    assert (sample(exact_pipeline, unipc, boundary=None).images - expected).square().mean().sqrt() <= 0.06
    with pytest.raises(ValueError, match="DDIMScheduler has prediction_type='flow_prediction', which it cannot"):
        sample(exact_pipeline, scheduler_like(DDIMScheduler, first))
    plain = scheduler_like(UniPCMultistepScheduler, DDIMScheduler(prediction_type="v_prediction"))
    assert plain.config.prediction_type == "v_prediction" and not plain.config.use_flow_sigmas
