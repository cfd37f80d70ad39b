"""Pipelines by the names that users know them by."""

import os
from pathlib import Path
from typing import Any

import diffusers

from .checkpoints import default_checkpoint
from .files import brief, check_safetensors, local_path, open_safetensors
from .identities import IDENTITIES, IdentityBank
from .models import IdentityFlow
from .pipeline_uiface import UIFacePipeline
from .two_stage.schedulers import scheduler_like


def pipeline_folder(model: str | os.PathLike | None = None) -> Path:
    """The folder of a pipeline, downloaded if need be.

    Args:
        model: a folder or a Hub repository; the embedded checkpoint if not given.
    """
    model = model or default_checkpoint()
    return Path(model) if Path(model).is_dir() else Path(UIFacePipeline.download(os.fspath(model)))


def model_identities(folder: Path, bank: Path | None = None) -> IdentityBank:
    """A bank of identities; if none is given, the one in a pipeline's folder.

    Raises:
        ValueError: it is missing or damaged.
    """
    bank = bank or folder / IDENTITIES
    if not bank.is_file():
        raise ValueError(f"{bank} is missing: name a bank of identities by --identities.")
    return IdentityBank.load(bank)


def load_pipeline(folder: str | os.PathLike, scheduler: str | None = None, **options: Any) -> UIFacePipeline:
    """The pipeline of a folder.

    Args:
        folder: see `pipeline_folder`.
        scheduler: a class of diffusers, made from the configuration of the pipeline's own scheduler.
        options: of `UIFacePipeline.from_pretrained`.

    Raises:
        OSError: a file is missing.
        ValueError: diffusers has no such scheduler, or the folder holds no pipeline, or a file of it is damaged.
    """
    folder = Path(folder)
    new_scheduler = None if scheduler is None else getattr(diffusers, scheduler, None)
    if scheduler is not None and ("Scheduler" not in scheduler or not hasattr(new_scheduler, "from_config")):
        raise ValueError(
            f"--scheduler {scheduler}: diffusers has no such scheduler. DDIMScheduler is one, for example."
        )
    try:
        pipeline = UIFacePipeline.from_pretrained(folder, **options)
    except OSError:
        check_safetensors(folder)
        raise
    except (AttributeError, ImportError, IndexError, KeyError, RuntimeError, TypeError) as error:
        reason = f"{type(error).__name__}: {brief(error)}"
        raise ValueError(f"{folder} holds no pipeline, or a file of it is damaged ({reason}).") from error
    if new_scheduler is not None:
        pipeline.scheduler = scheduler_like(new_scheduler, pipeline.scheduler)
    return pipeline


def load_identity_flow(name: str | os.PathLike) -> IdentityFlow:
    """The identity flow of a folder or a Hub repository.

    Raises:
        OSError: it is not there, or cannot be downloaded.
        ValueError: it is another model, or a file of it is damaged.
    """
    name = os.fspath(local_path(name)) if Path(local_path(name)).is_dir() else os.fspath(name)
    config = IdentityFlow.load_config(name)
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind != IdentityFlow.__name__:
        raise ValueError(
            f"{name} is no identity flow but holds {kind or 'no model'}: see training/train_identity_flow.py."
        )
    for file in Path(name).glob("*.safetensors"):
        with open_safetensors(file):  # for a reason why it cannot be loaded
            pass
    try:
        flow, report = IdentityFlow.from_pretrained(name, output_loading_info=True)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} holds no identity flow, or a file of it is damaged ({brief(error)}).") from error
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]]
    if wrong:
        raise ValueError(f"{name} is damaged: its weights do not fit its config, such as `{wrong[0]}`.")
    return flow.eval()
