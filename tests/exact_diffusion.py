"""A diffusion whose noise is predicted exactly, and its solution."""

import inspect
import math

import diffusers.schedulers
import numpy as np
import torch
from conftest import BETAS
from diffusers import DDIMScheduler
from exact_denoisers import DEVIATION

STOCHASTIC = (
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "SASolverScheduler",
)


LOG_SIGMAS = (DDIMScheduler(**BETAS).alphas_cumprod.double().reciprocal() - 1).log().numpy() / 2


def noise_level(timestep: float) -> tuple[float, float]:
    """Factor of the latents and of the noise, between whole timesteps as diffusers' sigmas are interpolated."""
    sigma = math.exp(np.interp(timestep, np.arange(1000), LOG_SIGMAS))
    return 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)


def standardized(latents: torch.Tensor, timestep: float, mean: torch.Tensor) -> torch.Tensor:
    """Along the probability flow of a normal distribution, this does not change."""
    alpha, sigma = noise_level(timestep)
    return (latents.double() - alpha * mean) / math.sqrt((alpha * DEVIATION) ** 2 + sigma**2)


def make_scheduler(name: str, **options):
    cls = getattr(diffusers.schedulers, name)
    known = inspect.signature(cls.__init__).parameters
    return cls(**{key: value for key, value in {**BETAS, "clip_sample": False, **options}.items() if key in known})


def best_noise(latents: torch.Tensor, timestep: float, mean: torch.Tensor) -> torch.Tensor:
    alpha, sigma = noise_level(timestep)
    return sigma * (latents - alpha * mean) / ((alpha * DEVIATION) ** 2 + sigma**2)
