"""A flow whose velocity is predicted exactly, and its solution."""

import math

import diffusers
import torch
from exact_denoisers import DEVIATION, sample_exactly

VELOCITY = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def velocity(latents: torch.Tensor, s: float, mean: torch.Tensor) -> torch.Tensor:
    """Mean of noise - x_0, given the latents (1 - s) x_0 + s noise: as no network can do better."""
    centered = latents.double() - (1 - s) * mean
    variance = ((1 - s) * DEVIATION) ** 2 + s**2
    return s * centered / variance - (mean + (1 - s) * DEVIATION**2 * centered / variance)


def standardized(latents: torch.Tensor, s: float, mean: torch.Tensor) -> torch.Tensor:
    """Along the flow, this does not change."""
    return (latents.double() - (1 - s) * mean) / math.sqrt(((1 - s) * DEVIATION) ** 2 + s**2)


def flow_level(t: int) -> float:
    """The noise level of the paper's timestep `t`, from its betas."""
    alpha = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(t + 1))
    ratio = math.sqrt((1 - alpha) / alpha)
    return ratio / (1 + ratio)


def make_scheduler(name: str):
    return getattr(diffusers, name)(**({} if name.startswith("FlowMatch") else VELOCITY))


def best_velocity(latents: torch.Tensor, timestep: float, mean: torch.Tensor) -> torch.Tensor:
    return velocity(latents, timestep / 1000, mean)


def sample(pipe, scheduler, **options):
    pipe.scheduler = scheduler
    return sample_exactly(pipe, injection=None, **options)
