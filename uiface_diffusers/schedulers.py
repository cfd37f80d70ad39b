"""Which of diffusers' schedulers sample a denoiser of 1000 discrete timesteps rightly in two stages."""

from typing import Any

import diffusers

# each is compared with the exact solution by tests/test_schedulers.py
SUPPORTED = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)


def check_scheduler(scheduler: Any) -> None:
    """Refuses a scheduler whose samples would be wrong.

    Raises:
        ValueError: it is none of `SUPPORTED`, or its configuration is for denoisers of another kind.
    """
    name = type(scheduler).__name__
    if not isinstance(scheduler, tuple(getattr(diffusers, supported) for supported in SUPPORTED)):
        raise ValueError(
            f"`scheduler` is {name}: its timesteps or noise levels are not those of the denoiser, or its steps do not"
            f" solve for it. These can be used: {', '.join(SUPPORTED)}."
        )
    config = scheduler.config
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{name} has prediction_type={prediction_type!r}: the contexts are combined as epsilon or v_prediction."
        )
    if config.get("timestep_type") == "continuous":
        raise ValueError(
            f"{name} has timestep_type='continuous': its timesteps are no timesteps of the denoiser. Use 'discrete'."
        )
    if config.get("use_flow_sigmas"):
        raise ValueError(f"{name} has use_flow_sigmas=True: the denoiser was not trained on flow matching's noise.")


def check_timesteps(scheduler: Any) -> None:
    """Refuses what `scheduler.set_timesteps` gave if the denoiser does not know it.

    Raises:
        ValueError: timesteps out of range, or not from noise to image.
    """
    timesteps, number = scheduler.timesteps, scheduler.config.num_train_timesteps
    name = type(scheduler).__name__
    if not timesteps.isfinite().all():
        raise ValueError(f"{len(timesteps)} timesteps of {name} are too few: one is not finite. Take more steps.")
    # those between two others are interpolated by KDPM2's, and rounded
    if timesteps.min() < 0 or timesteps.max() > number - 1 or (timesteps.diff() > 0.01).any():
        raise ValueError(
            f"the timesteps of {name} go from {float(timesteps[0]):g} to {float(timesteps[-1]):g}: they have to fall"
            f" within {number - 1} and 0."
        )
