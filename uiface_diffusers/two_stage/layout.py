"""A layout from a picture: its latents, noised to the boundary, take the place of what stage one lays out.

This is SDEdit (Meng et al. 2022, arXiv 2108.01073) with the boundary as its strength: all steps are of stage two,
which keeps what the noise has left of the picture (pose, light, expression, background) and brings the identity.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DPMSolverSinglestepScheduler, LMSDiscreteScheduler, PNDMScheduler

# the order of their first steps is that of the schedule's beginning, whatever they remember
NO_START_WITHIN = (LMSDiscreteScheduler, PNDMScheduler)


def first_evaluation(scheduler: Any, schedule: Sequence[float], boundary: float) -> int:
    """Which of the denoiser's evaluations is the first one after a layout.

    Args:
        scheduler: after its `set_timesteps`.
        schedule: its timesteps as those of the paper's schedule, see `paper_timesteps`.
        boundary (`float`): the first timestep that may be evaluated.

    Raises:
        ValueError: all steps are above the boundary, or the scheduler cannot begin within its schedule.
    """
    name = type(scheduler).__name__
    if isinstance(scheduler, NO_START_WITHIN):
        raise ValueError(f"{name} cannot begin within its schedule, as `layout` does: DDIMScheduler can, for example.")
    for i, t in enumerate(schedule):
        if t <= boundary and _begins_step(scheduler, i):
            return i
    raise ValueError(
        f"the last step of {name} is at the timestep {schedule[-1]:g}, above the boundary {boundary:g} that `layout`"
        " is noised to: nothing would be sampled. Give a higher boundary, or more steps."
    )


def _begins_step(scheduler: Any, i: int) -> bool:
    """Whether evaluation `i` of the schedule begins a step; see `starts_step`, which knows the present one alone."""
    if isinstance(scheduler, DPMSolverSinglestepScheduler):
        return scheduler.order_list[i] == 1
    return i % 2 == 0 or not hasattr(scheduler, "state_in_first_order")


def begin_within(scheduler: Any, schedule: Sequence[float], boundary: float) -> int:
    """Makes the `first_evaluation` that of the scheduler, and returns it."""
    first = first_evaluation(scheduler, schedule, boundary)
    if hasattr(scheduler, "set_begin_index"):  # the others look each timestep up
        scheduler.set_begin_index(first)
    return first


def noised_layout(scheduler: Any, i: int, layout: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The latents that evaluation `i` begins with.

    Args:
        scheduler: after `begin_within`, which gave `i`.
        layout (`torch.Tensor` of shape `(B or 1, channels, height, width)`): clean latents.
        noise (`torch.Tensor` of shape `(B, channels, height, width)`): of unit variance.

    Returns:
        `torch.Tensor` of the noise's shape, type and device.
    """
    # a copy, because some move their tables to the device of the samples
    scheduler, timesteps = copy.copy(scheduler), scheduler.timesteps[i].expand(len(noise))
    layout = layout.to(noise).expand_as(noise)
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(layout, timesteps, noise)
    return scheduler.add_noise(layout, noise, timesteps)
