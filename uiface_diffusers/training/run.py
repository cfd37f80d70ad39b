"""The engine of the training scripts: it gives batches to the loop of a script, and does what is due between steps.

args = parse_args(argv)
accelerator = make_accelerator(args)
with training_folder(accelerator, args) as checkpoint:
    ...  # data, models, optimizer
    run = Run("train", args, accelerator, checkpoint, product=..., log=log, ...)
    for batch in run:
        ...  # loss, backward, optimizer step: in the script
        log.add(...)
    run.finish()
"""

import argparse
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DynamoBackend, InitProcessGroupKwargs, ProjectConfiguration
from filelock import FileLock, Timeout
from huggingface_hub.errors import HTTPError
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..evaluation import load_lpips
from ..seeds import mix_seed
from .averages import WeightAverage
from .checkpoints import check_unchanged, find_checkpoint, load_checkpoint, save_checkpoint
from .means import RunningMeans
from .options import INDIFFERENT
from .order import EndlessBatchSampler
from .schedules import schedule_settings

logger = get_logger(__name__)

Module = TypeVar("Module", bound=nn.Module)

# what else a resumed training may change: its length; how it computes the same; paths, whose contents the scripts
# compare (`fixed` of `Run`); and of the schedule's options those that it does not read
CHANGEABLE = INDIFFERENT | {"max_train_steps", "max_train_hours", "epochs", "channels_last", "gradient_checkpointing"}
CHANGEABLE |= {"train_data", "init_from", "vae", "vae_subfolder", "encoder_root", "identity_encoder", "lpips_backbone"}
CHANGEABLE |= {"alignment_recognizer", "identity_recognizers"}
CHANGEABLE |= {"lr_warmup_steps", "lr_restart_steps", "lr_restart_factor", "lr_milestones", "lr_decay"}


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The accelerator of a script with the options of length, machine and checkpoints; begins to log."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=getattr(args, "gradient_accumulation_steps", 1),
        log_with=None if args.report_to == "none" else args.report_to,
        # the other processes wait while the first one encodes, checks or evaluates
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
        project_config=ProjectConfiguration(
            project_dir=str(args.output_dir), logging_dir=str(args.output_dir / "logs")
        ),
    )
    if accelerator.device.type == "cuda" and accelerator.mixed_precision != "no":
        # what is left in float32 then takes TF32 products, too
        torch.set_float32_matmul_precision("high")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return accelerator


def lasting_options(accelerator: Accelerator, args: argparse.Namespace) -> dict[str, Any]:
    """The options of a script that a resumed training has to share, all but `CHANGEABLE`."""
    options = {name: value for name, value in vars(args).items() if name not in CHANGEABLE}
    options |= {name: value for name, value in schedule_settings(args).items() if name != "max_train_steps"}
    return options | {"mixed_precision": accelerator.mixed_precision, "num_processes": accelerator.num_processes}


def _checkpoint(accelerator: Accelerator, args: argparse.Namespace) -> Path | None:
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoint is not None:
        check_unchanged(checkpoint, lasting_options(accelerator, args))
    return checkpoint


@contextmanager
def training_folder(accelerator: Accelerator, args: argparse.Namespace) -> Iterator[Path | None]:
    """Makes the folder of a training, `args.output_dir`. Within it, no other training can work there: both would write
    one checkpoint. Gives the checkpoint to go on from, as `find_checkpoint` does.

    Raises:
        ValueError: another one does; the checkpoint is of other options; or `find_checkpoint`'s.
    """
    folder = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    if not accelerator.is_main_process:
        yield _checkpoint(accelerator, args)
        return
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"another training works in {folder}: wait for it, or choose another --output-dir."
        ) from error
    try:
        yield _checkpoint(accelerator, args)
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def frozen(accelerator: Accelerator, module: Module) -> Module:
    """A module of a loss on this process's device, compiled as `Accelerator.prepare` compiles the trained model: by
    the backend of `ACCELERATE_DYNAMO_BACKEND` or `accelerate config`, if there is one."""
    module, plugin = module.to(accelerator.device), accelerator.state.dynamo_plugin
    return module if plugin.backend == DynamoBackend.NO else cast(Module, torch.compile(module, **plugin.to_kwargs()))


def load_perceptual(accelerator: Accelerator, network: str, backbone: str | None, spatial: bool) -> nn.Module:
    """LPIPS as a `frozen` module: a distance for each pair of pictures, or for each pixel if `spatial`."""
    perceptual = load_lpips(network, backbone)
    perceptual.spatial = spatial
    return frozen(accelerator, perceptual)


def is_due(step: int, every: int) -> bool:
    """Whether something is done after this step that is done every so many; 0: never."""
    return every > 0 and step % every == 0


def keep_batch(batch: Any) -> Any:
    """What the data sets fetch is a batch already."""
    return batch


class Product:
    """What a training makes. The class of a script says how it is saved and looked at. Its methods are called on the
    main process, with the averaged weights if there are any; `run` tells step and hours."""

    name: str

    def save(self, run: "Run", folder: Path) -> None:
        """Saves it into a folder: at the end, and as a snapshot."""
        raise NotImplementedError

    def validate(self, run: "Run") -> None:
        """Looks at it: reports figures, and at last writes what `is_validated` looks for."""
        raise NotImplementedError

    def is_validated(self, run: "Run") -> bool:
        """Whether the validation of this step was done before an interruption: by default, whether its picture
        exists."""
        return run.picture.exists()

    def upload(self, run: "Run", repo_id: str, message: str) -> None:
        """Uploads it, for scripts with `--push-to-hub`."""
        raise NotImplementedError


class Run:
    """A training from its beginning or a checkpoint to its end. Iterating over it gives the batches of this process on
    its device. Before each, torch is seeded by the training's seed, the step, the process and the number of the batch
    within the step. After the last batch of a step come the schedule, the average, and what is due: log, checkpoint,
    upload, validation, snapshot. It ends after `max_train_steps` or `max_train_hours`.

    Args:
        name (`str`): of the tracker's run.
        args (`argparse.Namespace`): the options of the script.
        accelerator (`Accelerator`): with all that is trained prepared, and what else a checkpoint has to keep
            registered.
        checkpoint (`Path`, *optional*): where to go on, as `find_checkpoint` gives it.
        dataset (`torch.utils.data.Dataset`): fetches a batch at a time, a tensor or a tuple of tensors.
        sampler (`EndlessBatchSampler`): of the data set; it is set to where the run begins.
        product (`Product`): what is saved, validated and uploaded.
        log (`RunningMeans`): the script adds to it in its loop.
        lr_scheduler: stepped once per step, whatever the number of processes: not given to `Accelerator.prepare`.
        fixed (`dict`): what a resumed run has to share besides its options: fingerprints of what paths lead to.
        average (`WeightAverage`, *optional*): stepped after every step.
        per_step (`dict[str, float]`, *optional*): what is logged in proportion to the steps, as samples seen.
        skips_overflow (`bool`, defaults to `True`): whether fp16 may skip a step whose loss is not finite.

    Attributes:
        step (`int`): optimizer steps so far; within the loop, the number of the present one, from 0.

    Raises:
        ValueError: the checkpoint is of other data or models.
    """

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        accelerator: Accelerator,
        checkpoint: Path | None,
        dataset: Dataset,
        sampler: EndlessBatchSampler,
        *,
        product: Product,
        log: RunningMeans,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        fixed: dict[str, Any],
        average: WeightAverage | None = None,
        per_step: Mapping[str, float] | None = None,
        skips_overflow: bool = True,
    ):
        self.args, self.accelerator, self.product, self.log = args, accelerator, product, log
        self.dataset, self.sampler, self.lr_scheduler, self.average = dataset, sampler, lr_scheduler, average
        self.per_step, self.skips_overflow = per_step or {}, skips_overflow
        fixed = {"faces": sampler.length, **fixed}
        if "max_train_steps" in schedule_settings(args):
            fixed["max_train_steps"] = args.max_train_steps
        self.fixed = lasting_options(accelerator, args) | fixed
        self.step, self.stopped = 0, False
        self._hours_before, self._started = 0.0, time.monotonic()
        if args.report_to != "none":
            settings = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str)}
            accelerator.init_trackers(name, config=settings)
        if checkpoint is not None:
            ema = None if average is None else average.ema
            check_unchanged(checkpoint, fixed)  # the options were, in `training_folder`
            self.step, self._hours_before = load_checkpoint(accelerator, ema, checkpoint)
            logger.info(f"resumed from {checkpoint}")
        self._progress: tqdm

    @property
    def hours(self) -> float:
        """How long has been trained, over all runs."""
        return self._hours_before + (time.monotonic() - self._started) / 3600

    @property
    def picture(self) -> Path:
        """The file of this step's validation."""
        return self.args.output_dir / "validation" / f"step-{self.step:07d}.png"

    @property
    def _snapshot(self) -> Path:
        return self.args.output_dir / f"step-{self.step:07d}"

    def __iter__(self) -> Iterator[Any]:
        args, accelerator = self.args, self.accelerator
        if self.step and accelerator.is_main_process:
            # what belonged to this step and was interrupted
            if self._validates() and not self.product.is_validated(self):
                self._validate()
            if self._takes_snapshot() and not self._snapshot.exists():
                self._save_snapshot()
        self._started, shown = time.monotonic(), accelerator.is_main_process
        steps = {"initial": self.step, "total": args.max_train_steps}
        self._progress = tqdm(**steps, desc="train", unit="step", disable=not shown)
        batches = self._batches()
        while self.step < args.max_train_steps and not self.stopped:
            for part in range(accelerator.gradient_accumulation_steps):
                batch = next(batches)
                torch.manual_seed(mix_seed(args.seed, self.step, accelerator.process_index, part))
                yield batch
            self._end_step()

    def _batches(self) -> Iterator[Any]:
        device = self.accelerator.device
        self.sampler.start = self.step * self.accelerator.gradient_accumulation_steps
        loader: DataLoader = DataLoader(
            self.dataset,
            batch_sampler=self.sampler,
            num_workers=self.args.dataloader_num_workers,
            collate_fn=keep_batch,
            pin_memory=device.type == "cuda",
        )
        for batch in loader:
            if isinstance(batch, torch.Tensor):
                yield batch.to(device, non_blocking=True)
            else:
                yield tuple(tensor.to(device, non_blocking=True) for tensor in batch)

    def _end_step(self) -> None:
        args, accelerator = self.args, self.accelerator
        self.lr_scheduler.step()
        if self.average is not None:
            self.average.step()
        self.step += 1
        self._progress.update()
        self.stopped = self._is_out_of_time()
        saves = self._is_last() or is_due(self.step, args.checkpointing_steps)
        if saves or is_due(self.step, args.logging_steps):
            self._log_means()
        if saves:
            ema = None if self.average is None else self.average.ema
            limit = args.checkpoints_total_limit
            save_checkpoint(accelerator, ema, args.output_dir, self.step, self.fixed, limit, self.hours)
        if accelerator.is_main_process:
            if saves and getattr(args, "push_to_hub", False):
                self._upload()
            if self._validates():
                self._validate()
            if self._takes_snapshot():
                self._save_snapshot()

    def _is_last(self) -> bool:
        return self.stopped or self.step == self.args.max_train_steps

    def _validates(self) -> bool:
        every = self.args.validation_steps
        return is_due(self.step, every) or (every > 0 and self._is_last())

    def _takes_snapshot(self) -> bool:
        return is_due(self.step, getattr(self.args, "snapshot_steps", 0))

    def _is_out_of_time(self) -> bool:
        """Whether this run is to stop; the main process decides for all."""
        most, accelerator = self.args.max_train_hours, self.accelerator
        late = most is not None and (time.monotonic() - self._started) / 3600 > most
        if most is None or accelerator.num_processes == 1:
            return late
        votes = torch.tensor(float(late and accelerator.is_main_process), device=accelerator.device)
        return bool(accelerator.reduce(votes, "sum"))

    def _averaged(self) -> AbstractContextManager:
        return nullcontext() if self.average is None else self.average.applied()

    def _log_means(self) -> None:
        """
        Raises:
            RuntimeError: the loss is not finite, which is beyond repair and not to be saved. fp16 skips a step that
                overflows.
        """
        means, finite = self.log.take(self.accelerator)
        skips = self.skips_overflow and self.accelerator.mixed_precision == "fp16"
        if finite == 0 or (finite < 1 and not skips):
            raise RuntimeError(f"the loss is not finite at step {self.step}: lower the learning rate, or use bf16.")
        progress = {name: value * self.step for name, value in self.per_step.items()}
        self.accelerator.log(means | {"lr": self.lr_scheduler.get_last_lr()[0]} | progress, step=self.step)
        shown = {name: f"{value:.4g}" for name, value in means.items() if not name.startswith("loss/")}
        shown |= {name: f"{value:.2f}" if isinstance(value, float) else f"{value}" for name, value in progress.items()}
        self._progress.set_postfix(shown)

    def report(self, figures: Mapping[str, float]) -> None:
        """Logs the figures of a validation, by their names, and prints them."""
        self.accelerator.log(dict(figures), step=self.step)
        text = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        tqdm.write(f"validation at step {self.step}: {text}")

    def log_picture(self, name: str, picture: PIL.Image.Image) -> None:
        """Logs a picture to the trackers that take pictures: MLflow, Comet and DVCLive do not."""
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: np.asarray(picture)[None]}, self.step, **layout)

    def save_picture(self, picture: PIL.Image.Image) -> None:
        """Saves the picture of a validation, which then counts as done."""
        self.picture.parent.mkdir(exist_ok=True)
        picture.save(self.picture)

    def _validate(self) -> None:
        with self._averaged():
            self.product.validate(self)

    def _save(self, folder: Path) -> None:
        with self._averaged():
            self.product.save(self, folder)

    def _save_snapshot(self) -> None:
        beside = self.args.output_dir / "snapshot.part"
        for earlier in (beside, self._snapshot):
            shutil.rmtree(earlier, ignore_errors=True)
        self._save(beside)
        beside.rename(self._snapshot)

    def _upload(self) -> None:
        """Uploads the product. What goes wrong is logged: a training does not end for it."""
        repo_id = self.args.hub_model_id or self.args.output_dir.resolve().name
        try:
            with self._averaged():
                self.product.upload(self, repo_id, f"Step {self.step}")
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            logger.warning(f"{repo_id} was not pushed to the Hub; the training goes on. {reason}")

    def finish(self) -> None:
        """Saves the product, after the loop."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._save(self.args.output_dir)
            logger.info(f"{self.product.name} saved to {self.args.output_dir}")
        self.accelerator.end_training()
