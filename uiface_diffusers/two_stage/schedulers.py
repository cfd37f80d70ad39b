"""Which of diffusers' schedulers sample a denoiser of 1000 discrete timesteps rightly in two stages, and what they
remember when a sample changes stage."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DPMSolverSinglestepScheduler, PNDMScheduler


@dataclass(frozen=True)
class Memory:
    """What a scheduler remembers of earlier steps.

    Args:
        history (`str`, *optional*): its attribute with earlier predictions, in a form of its own.
        corrects (`bool`, defaults to `False`): it goes back on the last step, which it keeps as `last_sample`.
    """

    history: str | None = None
    corrects: bool = False


# each is compared with the exact solution by tests/test_schedulers.py
SUPPORTED = {
    "DDIMParallelScheduler": Memory(),
    "DDIMScheduler": Memory(),
    "DDPMParallelScheduler": Memory(),
    "DDPMScheduler": Memory(),
    "DEISMultistepScheduler": Memory("model_outputs"),
    "DPMSolverMultistepScheduler": Memory("model_outputs"),
    "DPMSolverSinglestepScheduler": Memory("model_outputs"),
    "EulerAncestralDiscreteScheduler": Memory(),
    "EulerDiscreteScheduler": Memory(),
    "HeunDiscreteScheduler": Memory(),
    "KDPM2AncestralDiscreteScheduler": Memory(),
    "KDPM2DiscreteScheduler": Memory(),
    "LMSDiscreteScheduler": Memory("derivatives"),
    "PNDMScheduler": Memory("ets"),
    "SASolverScheduler": Memory("model_outputs", corrects=True),
    "UniPCMultistepScheduler": Memory("model_outputs", corrects=True),
}


def memory_of(scheduler: Any) -> Memory | None:
    """Of a scheduler's class, or of the one that it derives from; `None` if it is not in `SUPPORTED`."""
    classes = ((getattr(diffusers, name), memory) for name, memory in SUPPORTED.items())
    return next((memory for supported, memory in classes if isinstance(scheduler, supported)), None)


def check_scheduler(scheduler: Any) -> None:
    """Refuses a scheduler whose samples would be wrong.

    Raises:
        ValueError: it is not in `SUPPORTED`, or its configuration does not fit a denoiser of 1000 discrete timesteps.
    """
    name = type(scheduler).__name__
    if memory_of(scheduler) is None:
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


def starts_step(scheduler: Any) -> bool:
    """Whether the scheduler's next evaluation begins a step. An inner evaluation of a Runge-Kutta or second-order step
    belongs to the step that is under way: there no sample switches and no map is taken."""
    if isinstance(scheduler, PNDMScheduler):
        counter, warm_up = scheduler.counter, len(scheduler.prk_timesteps)
        return counter % 4 == 0 if counter < warm_up else counter != 1
    if isinstance(scheduler, DPMSolverSinglestepScheduler):
        return scheduler.order_list[scheduler.step_index or 0] == 1
    return getattr(scheduler, "state_in_first_order", True)


def _random_generators(
    generator: torch.Generator | list[torch.Generator] | None, device: torch.device
) -> list[torch.Generator]:
    """Those that diffusers' `randn_tensor` draws from: without a generator, the default one of the samples' device.

    Raises:
        ValueError: the default generator of that device is not known.
    """
    if generator is not None:
        return generator if isinstance(generator, list) else [generator]
    if device.type == "cpu":
        return [torch.default_generator]
    if device.type == "mps":
        return [torch.mps._get_default_mps_generator()]
    of_devices = getattr(getattr(torch, device.type, None), "default_generators", ())
    if not of_devices:
        raise ValueError(f"the default random generator of the device `{device}` is not known: give `generator`.")
    return [of_devices[device.index or 0]]


def step_after_switch(
    scheduler,
    switched: torch.Tensor,
    model_output: torch.Tensor,
    timestep: torch.Tensor,
    sample: torch.Tensor,
    **step_kwargs: Any,
) -> torch.Tensor:
    """`scheduler.step` where the context of some samples has just changed. What a multistep scheduler remembers of
    them is replaced, as if the present prediction had been theirs at every remembered step: their update is the
    first-order one and mixes no two contexts. A corrector does not go back on their last step.

    Args:
        scheduler: a diffusers scheduler, with history or without.
        switched (`torch.LongTensor`): the samples whose context changed; none is a plain step.
        model_output, timestep, sample, step_kwargs: what `scheduler.step` takes.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`: the previous sample.

    Raises:
        ValueError: `generator` is `None` on a device whose default generator is not known.
    """

    def step() -> torch.Tensor:
        return scheduler.step(model_output, timestep, sample, **step_kwargs, return_dict=False)[0]

    if not len(switched):
        return step()
    memory, switched = memory_of(scheduler), switched.to(sample.device, non_blocking=True)

    def step_copy(copied) -> torch.Tensor:
        # the copy draws the noise that the scheduler itself will draw after it; not every step takes a generator
        draws = "generator" in inspect.signature(scheduler.step).parameters
        generators = _random_generators(step_kwargs.get("generator"), sample.device) if draws else []
        states = [each.get_state() for each in generators]
        previous = copied.step(model_output, timestep, sample, **step_kwargs, return_dict=False)[0]
        for each, state in zip(generators, states, strict=True):
            each.set_state(state)
        return previous

    remembered = [entry for entry in getattr(scheduler, memory.history) if entry is not None] if memory.history else []
    if remembered:
        # let a copy bring the present prediction into the scheduler's form
        probe = copy.deepcopy(scheduler)
        step_copy(probe)
        present = [entry for entry in getattr(probe, memory.history) if entry is not None][-1]
        for entry in remembered:
            entry[switched] = present[switched].to(entry.dtype)

    if not memory.corrects or scheduler.last_sample is None:
        return step()
    # the rows of a copy that has no last step to correct
    restarted = copy.deepcopy(scheduler)
    restarted.last_sample = None
    restarted_previous = step_copy(restarted)
    previous = step()
    previous[switched] = restarted_previous[switched]
    scheduler.last_sample[switched] = restarted.last_sample[switched]
    return previous
