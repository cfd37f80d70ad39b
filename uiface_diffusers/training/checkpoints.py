"""Checkpoints of a training: complete folders only, which one to go on from, and what must not have changed since."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file

from ..files import brief, read_json, read_safetensors

logger = logging.getLogger(__name__)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints by their step: an unfinished one has another name."""
    paths = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(paths, key=_checkpoint_step)


def _checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint to go on from.

    Args:
        output_dir: where the checkpoints are.
        resume_from_checkpoint: a checkpoint folder, `"latest"`, or `None` for a new training.

    Raises:
        ValueError: it does not exist, or a later one of another course of training would be in the way of new ones.
    """
    checkpoints = list_checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        if not checkpoints:
            logger.warning(f"no checkpoint in {output_dir}: a new training starts")
        return checkpoints[-1] if checkpoints else None
    path = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
    if path is not None and not (path / "training.json").is_file():
        raise ValueError(f"{path} is no checkpoint; in {output_dir} are {[p.name for p in checkpoints]}.")
    step = -1 if path is None else _read_state(path)["step"]
    later = [p for p in checkpoints if _checkpoint_step(p) > step]
    if later:
        raise ValueError(
            f"{output_dir} has {[p.name for p in later]}: go on with --resume-from-checkpoint latest, delete"
            " them, or choose another --output-dir."
        )
    return path


def save_checkpoint(
    accelerator: Accelerator,
    ema: EMAModel | None,
    output_dir: Path,
    step: int,
    fixed: dict,
    total_limit: int,
    hours: float,
) -> None:
    """Saves all that a resumed run needs. Writes beside and renames, so that a kill at any moment leaves complete
    checkpoints only.

    Args:
        ema: the averaged weights, if there are any.
        fixed: settings that a resumed run has to share.
        total_limit: older checkpoints beyond this number are deleted.
        hours: how long has been trained, over all runs.
    """
    beside = output_dir / "checkpoint.part"
    if accelerator.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(beside)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state = {"step": step, "hours": round(hours, 4), "fixed": fixed}
        if ema is not None:
            shadow = {str(i): parameter.contiguous() for i, parameter in enumerate(ema.shadow_params)}
            save_file(shadow, beside / "ema.safetensors")
            state["ema_step"] = ema.optimization_step
        (beside / "training.json").write_text(json.dumps(state, indent=1) + "\n")
        beside.rename(output_dir / f"checkpoint-{step}")
        for old in list_checkpoints(output_dir)[:-total_limit]:
            # renamed before it is deleted: a folder with a checkpoint's name is always complete
            shutil.rmtree(beside, ignore_errors=True)
            shutil.rmtree(old.rename(beside))


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: the checkpoint's `training.json` is damaged.
    """
    state = read_json(checkpoint / "training.json")
    if not isinstance(state, dict) or "step" not in state:
        raise ValueError(f"{checkpoint / 'training.json'} is damaged: go on with an earlier checkpoint.")
    return state


def check_unchanged(checkpoint: Path, fixed: dict) -> None:
    """Compares some of the settings that a resumed training has to share with those of a checkpoint. Warns of those
    that the checkpoint does not have, and if `max_train_steps` is among them and has changed: trainings are extended,
    but the learning rate jumps.

    Raises:
        ValueError: a setting has changed since: the training would go on with two kinds of steps, the order of the
            data would be another (some faces would be seen twice, others never), or the checkpoint's state would
            silently overrule it.
    """
    before, fixed = _read_state(checkpoint).get("fixed", {}), json.loads(json.dumps(fixed))
    unknown = sorted(fixed.keys() - before.keys())
    if unknown:  # of an earlier version
        logger.warning(f"{checkpoint} does not say its {', '.join(unknown)}: whether they are the same is not checked")
    changed = {
        name: f"{name}: {before[name]} then, {value} now"
        for name, value in fixed.items()
        if name in before and before[name] != value
    }
    steps = changed.pop("max_train_steps", None)
    if steps is not None:
        logger.warning(f"{checkpoint} is resumed with another end of the schedule ({steps}): the learning rate jumps")
    if changed:
        raise ValueError(
            f"{checkpoint} cannot be resumed with other settings ({'; '.join(changed.values())}): go on with the"
            " earlier ones, or begin in another --output-dir."
        )


def load_checkpoint(accelerator: Accelerator, ema: EMAModel | None, checkpoint: Path) -> tuple[int, float]:
    """Restores the state of a checkpoint, with the averaged weights if there are any.

    Returns:
        Its step, and the hours that it took to come there.
    """
    state = _read_state(checkpoint)
    try:
        accelerator.load_state(checkpoint)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"{checkpoint} is of another network than these settings make ({brief(error)}): go on with the earlier"
            " settings, or begin in another --output-dir."
        ) from error
    if ema is not None:
        shadow = read_safetensors(checkpoint / "ema.safetensors")
        for i, parameter in enumerate(ema.shadow_params):
            parameter.copy_(shadow[str(i)])
        ema.optimization_step = state["ema_step"]
    return state["step"], state["hours"]
