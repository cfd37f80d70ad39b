"""What a denoiser is trained to predict of noisy latents: noise, v, or the velocity of flow matching.

Another prediction is another class here, with an entry in `OBJECTIVES`. Timesteps are indices of the noise schedule,
from 0 to `num_train_timesteps` - 1, of shape `(batch,)`; latents, noise and predictions are `(batch, C, h, w)`.
"""

from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from ..convert_original import NOISE_SCHEDULE, SAMPLER
from ..two_stage.schedulers import is_flow, prediction_type


class NoisePrediction:
    """The noise of x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (Ho et al. 2020; UIFace, sec. 3.2).

    Args:
        scheduler: a diffusers scheduler with `add_noise` and `alphas_cumprod`.
    """

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps)

    def denoiser_timesteps(self, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser is given for them."""
        return timesteps

    def signal(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The share of the latents in the variance, `(batch,)`: alpha_bar."""
        return self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noise

    def denoised(self, noisy: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The clean latents of a prediction: one step to the end of the trajectory."""
        alphas = self.signal(timesteps).view(-1, 1, 1, 1)
        return (noisy - (1 - alphas).sqrt() * prediction) / alphas.sqrt()

    def weighted(self, loss: torch.Tensor, timesteps: torch.Tensor, snr_gamma: float) -> torch.Tensor:
        """Each sample's loss, `(batch,)`, with min-SNR weights (Hang et al. 2023, sec. 3.4): min(snr, gamma) on the
        clean latents."""
        snr = compute_snr(self.scheduler, timesteps)
        return loss * snr.clamp(max=snr_gamma) / snr


class VPrediction(NoisePrediction):
    """v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (Salimans and Ho 2022)."""

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.scheduler.get_velocity(latents, noise, timesteps)

    def denoised(self, noisy: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        alphas = self.signal(timesteps).view(-1, 1, 1, 1)
        return alphas.sqrt() * noisy - (1 - alphas).sqrt() * prediction

    def weighted(self, loss: torch.Tensor, timesteps: torch.Tensor, snr_gamma: float) -> torch.Tensor:
        snr = compute_snr(self.scheduler, timesteps)
        return loss * snr.clamp(max=snr_gamma) / (snr + 1)


class FlowPrediction(NoisePrediction):
    """The velocity noise - x_0 of straight paths x_t = (1 - s) x_0 + s noise (Lipman et al. 2023; Liu et al. 2023).
    Timestep i is the noise level s = (i + 1) / `num_train_timesteps`, as diffusers' schedulers count, and the denoiser
    is given i + 1."""

    def _level(self, timesteps: torch.Tensor) -> torch.Tensor:
        return (timesteps + 1) / self.scheduler.config.num_train_timesteps

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        level = self._level(timesteps).view(-1, 1, 1, 1)
        return (1 - level) * latents + level * noise

    def denoiser_timesteps(self, timesteps: torch.Tensor) -> torch.Tensor:
        return timesteps + 1

    def signal(self, timesteps: torch.Tensor) -> torch.Tensor:
        level = self._level(timesteps)
        return (1 - level) ** 2 / ((1 - level) ** 2 + level**2)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noise - latents

    def denoised(self, noisy: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noisy - self._level(timesteps).view(-1, 1, 1, 1) * prediction

    def weighted(self, loss: torch.Tensor, timesteps: torch.Tensor, snr_gamma: float) -> torch.Tensor:
        level = self._level(timesteps)
        # an error of the velocity is s times as large on the clean latents
        return loss * (((1 - level) / level) ** 2).clamp(max=snr_gamma) * level**2


OBJECTIVES: dict[str, type[NoisePrediction]] = {
    "epsilon": NoisePrediction,
    "v_prediction": VPrediction,
    "flow_prediction": FlowPrediction,
}
# of those that are linear in the noisy latents with bounded factors: losses on the denoised latents make sense
PREDICTS_LATENTS = ("v_prediction", "flow_prediction")


def objective_of(scheduler: Any) -> NoisePrediction:
    """What the denoiser of a scheduler is trained to predict.

    Raises:
        ValueError: the scheduler names another prediction.
    """
    name = prediction_type(scheduler)
    if name not in OBJECTIVES:
        raise ValueError(
            f"{type(scheduler).__name__} has prediction_type={name!r}; trained can be {', '.join(OBJECTIVES)}."
        )
    return OBJECTIVES[name](scheduler)


def new_sampler(prediction: str) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """The scheduler that a pipeline trained with this prediction is saved with: the paper's DDIM, or Euler's method
    for flow matching."""
    if prediction == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler()
    return DDIMScheduler(**NOISE_SCHEDULE, **SAMPLER, prediction_type=prediction)


def training_scheduler(sampler: Any) -> Any:
    """The noise schedule of training for a pipeline's scheduler."""
    return sampler if is_flow(sampler) else DDPMScheduler.from_config(sampler.config)
