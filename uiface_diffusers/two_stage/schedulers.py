"""Which of diffusers' schedulers sample a denoiser rightly in two stages, the noise levels of their timesteps, and
what they remember when a sample changes stage.

The method's timesteps (boundaries, caps, guidance intervals) are those of the paper's noise schedule: 1000 timesteps,
betas linear from 1e-4 to 0.02. What they mean is a noise level, the ratio of noise to signal in
x_t = a x_0 + s noise:

    paper   s / a = sqrt((1 - alpha_bar_t) / alpha_bar_t), -2 log(s / a) being the log-SNR
    flow    a = 1 - s, so that s / a = s / (1 - s), which is the paper's at s = r / (1 + r), r = s / a of the paper

At t = 500, r is 3.443, and so the flow's s is 0.775. `paper_timesteps` goes the other way.
"""

import copy
import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverSinglestepScheduler, PNDMScheduler


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


# the same with the velocity of flow matching, of straight paths x_t = (1 - s) x_0 + s noise; DEIS's and SA-Solver's
# last step would leave noise
FLOW = {
    "DPMSolverMultistepScheduler": Memory("model_outputs"),
    "DPMSolverSinglestepScheduler": Memory("model_outputs"),
    "FlowMatchEulerDiscreteScheduler": Memory(),
    "FlowMatchHeunDiscreteScheduler": Memory(),
    "UniPCMultistepScheduler": Memory("model_outputs", corrects=True),
}

# with the reason, which follows the name
_REASONS = {
    "samples tokens of a vocabulary": (
        "AmusedScheduler",
        "BlockRefinementScheduler",
        "DiscreteDDIMScheduler",
        "EntropyBoundScheduler",
        "VQDiffusionScheduler",
    ),
    "samples a distilled model in a few steps of its own": (
        "CMStochasticIterativeScheduler",
        "ConsistencyDecoderScheduler",
        "FlowMapEulerDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "HeliosDMDScheduler",
        "LCMScheduler",
        "PiflowScheduler",
        "SCMScheduler",
        "TCDScheduler",
    ),
    "gives the denoiser other timesteps or noise levels than it was trained on": (
        "CosineDPMSolverMultistepScheduler",
        "DDPMWuerstchenScheduler",
        "EDMDPMSolverMultistepScheduler",
        "EDMEulerScheduler",
        "IPNDMScheduler",
        "KarrasVeScheduler",
        "ScoreSdeVeScheduler",
        "ScoreSdeVpScheduler",
        "UnCLIPScheduler",
    ),
    "is made for one video, sound or molecule model": (
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
        "HeliosScheduler",
        "LTXEulerAncestralRFScheduler",
        "MiniMaxH3Scheduler",
        "RFD4ProteinaScheduler",
    ),
    "goes from picture to noise": ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"),
    "needs torchsde, and draws noise that does not depend on the sample's generator alone": ("DPMSolverSDEScheduler",),
    "goes back to noisier timesteps, to repaint": ("RePaintScheduler",),
}
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names}


def _is_one_of(scheduler: Any, names: Iterable[str]) -> bool:
    return isinstance(scheduler, tuple(getattr(diffusers, name) for name in names))


def _is_flow_only(scheduler: Any) -> bool:
    return _is_one_of(scheduler, FLOW.keys() - SUPPORTED.keys())


def memory_of(scheduler: Any) -> Memory | None:
    """Of a scheduler's class, or of the one that it derives from; `None` if it is not in `SUPPORTED` or `FLOW`."""
    classes = ((getattr(diffusers, name), memory) for name, memory in (SUPPORTED | FLOW).items())
    return next((memory for supported, memory in classes if isinstance(scheduler, supported)), None)


def prediction_type(scheduler: Any) -> str:
    """What the denoiser predicts: `"epsilon"`, `"v_prediction"`, `"flow_prediction"`, or another kind."""
    return scheduler.config.get("prediction_type", "flow_prediction" if _is_flow_only(scheduler) else "epsilon")


def is_flow(scheduler: Any) -> bool:
    """Whether its denoiser predicts the velocity of flow matching, noise - x_0."""
    return prediction_type(scheduler) == "flow_prediction"


def check_scheduler(scheduler: Any) -> None:
    """Refuses a scheduler whose samples would be wrong.

    Raises:
        ValueError: it is not in `SUPPORTED` or `FLOW`, or its configuration does not fit the denoiser.
    """
    name = type(scheduler).__name__
    if memory_of(scheduler) is None:
        reason = REFUSED.get(
            name, "has timesteps or noise levels that are not those of the denoiser, or steps that do not solve for it"
        )
        raise ValueError(
            f"`scheduler` is {name}: it {reason}. These can be used: {', '.join(SUPPORTED)}; with flow matching,"
            f" {', '.join(FLOW)}."
        )
    config, predicted = scheduler.config, prediction_type(scheduler)
    if predicted == "flow_prediction" or _is_flow_only(scheduler):
        _check_flow(scheduler)
        return
    if predicted not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{name} has prediction_type={predicted!r}: the contexts are combined as epsilon, v_prediction or"
            " flow_prediction."
        )
    if "invert_sigmas" in config:
        raise ValueError(
            f"{name} was made from the configuration of a flow-matching scheduler, but samples {predicted}: use one of"
            f" {', '.join(FLOW)}, with prediction_type='flow_prediction' and use_flow_sigmas=True where it takes them."
        )
    if config.get("timestep_type") == "continuous":
        raise ValueError(
            f"{name} has timestep_type='continuous': its timesteps are no timesteps of the denoiser. Use 'discrete'."
        )
    if config.get("use_flow_sigmas"):
        raise ValueError(f"{name} has use_flow_sigmas=True: the denoiser was not trained on flow matching's noise.")


def _check_flow(scheduler: Any) -> None:
    """
    Raises:
        ValueError: a scheduler of a denoiser that predicts the velocity would not sample it rightly.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if not _is_one_of(scheduler, FLOW):
        raise ValueError(
            f"{name} has prediction_type='flow_prediction', which it cannot sample. These can: {', '.join(FLOW)}."
        )
    if prediction_type(scheduler) != "flow_prediction":
        raise ValueError(
            f"{name} has prediction_type={prediction_type(scheduler)!r}, as a denoiser that predicts no velocity of"
            " flow matching: its steps would be wrong."
        )
    if not _is_flow_only(scheduler) and not config.use_flow_sigmas:
        raise ValueError(
            f"{name} has prediction_type='flow_prediction' without use_flow_sigmas=True: its noise levels are not"
            " those of flow matching."
        )
    for option, wrong, instead in (
        ("use_dynamic_shifting", True, "give a fixed shift"),
        ("stochastic_sampling", True, "it is made for consistency models"),
        ("algorithm_type", "dpmsolver", "use 'dpmsolver++'"),
        ("algorithm_type", "sde-dpmsolver", "use 'sde-dpmsolver++'"),
        ("algorithm_type", "noise_prediction", "use 'data_prediction'"),
        ("predict_x0", False, "use True"),
    ):
        if config.get(option) == wrong:
            raise ValueError(f"{name} has {option}={wrong!r}, which flow matching is not sampled with: {instead}.")


def scheduler_like(scheduler_class: Any, scheduler: Any, **options: Any) -> Any:
    """A scheduler of another class for the same denoiser: `from_config`, with flow matching in that class's words.

    Args:
        scheduler_class: of diffusers.
        scheduler: the denoiser's.
        options: of the new one's own.
    """
    if is_flow(scheduler):
        shift = scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0))
        told = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift, "shift": shift}
        known = inspect.signature(scheduler_class.__init__).parameters
        options = {name: value for name, value in told.items() if name in known} | options
    return scheduler_class.from_config(scheduler.config, **options)


def set_timesteps(scheduler: Any, num_inference_steps: int) -> None:
    """`scheduler.set_timesteps`. A flow's rounded timesteps may repeat: it is told to begin at the first, and does not
    look it up."""
    scheduler.set_timesteps(num_inference_steps)
    if is_flow(scheduler):
        scheduler.set_begin_index(0)


def denoiser_timesteps(scheduler: Any) -> torch.Tensor:
    """The timesteps of `scheduler.set_timesteps` as the denoiser is given them: those of flow matching are its noise
    levels times 1000, which most schedulers round."""
    timesteps = scheduler.timesteps
    if is_flow(scheduler):
        timesteps = scheduler.sigmas[: len(timesteps)].to(timesteps.device) * scheduler.config.num_train_timesteps
    return timesteps.float() if timesteps.is_floating_point() else timesteps


def scale_model_input(scheduler: Any, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """`scheduler.scale_model_input`, which flow-matching schedulers lack."""
    scale = getattr(scheduler, "scale_model_input", None)
    return latents if scale is None else scale(latents, timestep)


def _log_noise_levels(alphas_cumprod: torch.Tensor) -> np.ndarray:
    """log(s / a) of every timestep of a noise schedule, ascending."""
    alphas = np.array(alphas_cumprod.double().clamp(1e-12, 1 - 1e-12).tolist())
    return np.log((1 - alphas) / alphas) / 2


@functools.cache
def _paper_levels() -> np.ndarray:
    return _log_noise_levels(DDPMScheduler(1000, 1e-4, 0.02, "linear").alphas_cumprod)


def paper_timesteps(scheduler: Any) -> list[float]:
    """The timesteps of `scheduler.set_timesteps` as those of the paper's noise schedule with the same log-SNR: what
    boundaries, caps and guidance intervals are compared with.

    With the paper's own schedule, they are the scheduler's. Of any other they are rounded, because no noise level
    falls on one exactly, and from 0 to 999: noise beyond the paper's, as the pure noise at a flow's s = 1, counts as
    999.
    """
    levels = _paper_levels()
    if is_flow(scheduler):
        sigmas = np.array(scheduler.sigmas[: len(scheduler.timesteps)].double().tolist())
        with np.errstate(divide="ignore"):
            noise = np.log(sigmas) - np.log(1 - sigmas)
    else:
        own, timesteps = _log_noise_levels(scheduler.alphas_cumprod), scheduler.timesteps.double().tolist()
        if len(own) == len(levels) and np.allclose(own, levels, atol=1e-2):
            return timesteps
        noise = np.interp(timesteps, np.arange(len(own)), own)
    return np.interp(noise, levels, np.arange(len(levels))).round().tolist()


def check_timesteps(scheduler: Any) -> None:
    """Refuses what `scheduler.set_timesteps` gave if the denoiser does not know it.

    Raises:
        ValueError: timesteps out of range, or not from noise to image.
    """
    timesteps, number = scheduler.timesteps, scheduler.config.num_train_timesteps
    name = type(scheduler).__name__
    if not timesteps.isfinite().all():
        raise ValueError(f"{len(timesteps)} timesteps of {name} are too few: one is not finite. Take more steps.")
    # flow matching starts at pure noise
    highest = number if is_flow(scheduler) else number - 1
    # those between two others are interpolated by KDPM2's, and rounded
    if timesteps.min() < 0 or timesteps.max() > highest or (timesteps.diff() > 0.01).any():
        raise ValueError(
            f"the timesteps of {name} go from {float(timesteps[0]):g} to {float(timesteps[-1]):g}: they have to fall"
            f" within {highest} and 0."
        )
    if not is_flow(scheduler):
        return
    if ((denoiser_timesteps(scheduler) - timesteps).abs() > 1).any():
        raise ValueError(f"the timesteps of {name} are not its noise levels: use its flow sigmas as they are.")
    if scheduler.sigmas[-1] > 0:
        raise ValueError(f"{name} ends at the noise level {float(scheduler.sigmas[-1]):.3g}: it has to end at 0.")


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
    scheduler: Any,
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
    assert memory is not None, "`check_scheduler` refuses it"

    def step_copy(copied: Any) -> torch.Tensor:
        # the copy draws the noise that the scheduler itself will draw after it; not every step takes a generator
        draws = "generator" in inspect.signature(scheduler.step).parameters
        generators = _random_generators(step_kwargs.get("generator"), sample.device) if draws else []
        states = [each.get_state() for each in generators]
        previous = copied.step(model_output, timestep, sample, **step_kwargs, return_dict=False)[0]
        for each, state in zip(generators, states, strict=True):
            each.set_state(state)
        return previous

    history = memory.history

    def remembered_by(stepped: Any) -> list[torch.Tensor]:
        return [entry for entry in getattr(stepped, history) if entry is not None] if history else []

    remembered = remembered_by(scheduler)
    if remembered:
        # let a copy bring the present prediction into the scheduler's form
        probe = copy.deepcopy(scheduler)
        step_copy(probe)
        present = remembered_by(probe)[-1]
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
