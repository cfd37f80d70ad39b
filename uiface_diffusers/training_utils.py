"""What the scripts in `training/` share: recipes, the order of the data, checkpoints."""

import argparse
import functools
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, InitProcessGroupKwargs, ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Sampler

from .data import FaceCache
from .faces import SIDE_VIEW
from .files import paragraph, read_json, read_safetensors
from .options import expand_home, real, whole
from .seeds import mix_seed

logger = logging.getLogger(__name__)


# an option that the command line can also turn off, as --no-NAME
SWITCH = {"action": argparse.BooleanOptionalAction, "default": False}


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`: what a user can mend ends it with a message and exit code 1, not with a traceback."""
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {paragraph(error)}")


def open_caches(folders: Sequence[str | os.PathLike]) -> list[FaceCache]:
    """Caches of `prepare_faces` that are trained on together.

    Raises:
        ValueError: one is no finished cache, or they differ in size.
    """
    caches = [FaceCache(folder) for folder in folders]
    sizes = {str(cache.folder): cache.image_size for cache in caches}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the caches differ in `image_size`: {sizes}. Prepare them alike.")
    return caches


def parse_recipe(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, required: Sequence[str] = ()
) -> argparse.Namespace:
    """Parses the command line of a script whose parser has a `--config`: a YAML file with any of its options. The
    command line wins; both are checked alike.

    Args:
        parser: the script's.
        argv: the command line; `sys.argv` if not given.
        required: options that have to be given in one of the two places.
    """
    argv = expand_home(argv)
    known, _ = parser.parse_known_args(argv)
    if known.config is not None:
        try:
            config = yaml.safe_load(known.config.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"--config {known.config} cannot be read: {error}")
        if not isinstance(config, dict):
            parser.error(f"--config {known.config} has to map names of options to values")
        unknown = sorted(config.keys() - vars(known).keys())
        if unknown:
            parser.error(f"{known.config} has unknown options: {', '.join(unknown)}")
        # as if they stood in front on the command line, so that they are checked alike
        recipe = [word for name, value in config.items() for word in _option_words(name, value)]
        argv = expand_home(recipe) + argv
    args = parser.parse_args(argv)
    for name in required:
        if not getattr(args, name):
            parser.error(f"--{name} is required")
    return args


def _option_words(name: str, value) -> list[str]:
    """An entry of the YAML file as words of the command line."""
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


class EndlessBatchSampler(Sampler):
    """Batches of one process, epoch after epoch, from batch `start` on. An epoch's order depends on seed and epoch
    only, so that a resumed run sees what it has not seen yet; processes take turns in that order.

    Args:
        length (`int`): samples in an epoch.
        batch_size (`int`): of one process.
        seed (`int`): of the order.
        rank (`int`): this process.
        world_size (`int`): number of processes.
        start (`int`): batches that this process has seen already.
        weights (`torch.Tensor` of shape `(length,)`, *optional*): how often each sample is drawn, relative to the
            others. By default, every sample once per epoch.

    Raises:
        ValueError: the samples do not fill one batch of every process.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        weights: torch.Tensor | None = None,
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start
        self.weights = weights
        self.batches_per_epoch = length // (batch_size * world_size)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"{length} faces do not fill {world_size} batch(es) of {batch_size}: lower --train_batch_size."
            )

    def _order(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        if self.weights is None:
            return torch.randperm(self.length, generator=generator)
        return torch.multinomial(self.weights, self.length, replacement=True, generator=generator)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = divmod(self.start, self.batches_per_epoch)
        while True:
            order = self._order(epoch)
            for batch in range(position, self.batches_per_epoch):
                first = (batch * self.world_size + self.rank) * self.batch_size
                yield order[first : first + self.batch_size].tolist()
            epoch, position = epoch + 1, 0


def sampling_weights(
    names: Sequence[str],
    lengths: Sequence[int],
    poses: np.ndarray | None = None,
    balanced: bool = False,
    shares: Sequence[float] | None = None,
    side_view_share: float | None = None,
) -> torch.Tensor | None:
    """How often each face of several caches is drawn, for `EndlessBatchSampler`: the product of a factor of its
    identity (one over its number of faces, if balanced), one of its cache and one of its pose. The latter two are such
    that caches and side views get their shares of what is drawn, both at once, by iterative proportional fitting
    (Deming & Stephan 1940).

    Args:
        names: the identity of each face, another one in each cache.
        lengths: faces of each cache, in the order of `names`.
        poses (`np.ndarray` of shape `(N, 2)`, *optional*): `FaceCache.poses`, for `side_view_share`. Faces whose pose
            is not known (NaN) count as no side views.
        balanced (`bool`, defaults to `False`): every identity as often, but for the shares.
        shares (*optional*): how much of what is drawn is of each cache, relative to the others; in proportion to the
            weights of their faces if not given.
        side_view_share (`float`, *optional*): how much of what is drawn looks sideways, |yaw| > 0.25.

    Returns:
        `torch.Tensor` of shape `(N,)`, or `None` if all faces are drawn alike.

    Raises:
        ValueError: no pose is known, or the faces do not allow the shares.
    """
    if not balanced and shares is None and side_view_share is None:
        return None
    weights = np.ones(len(names))
    if balanced:
        _, numbers, counts = np.unique(names, return_inverse=True, return_counts=True)
        weights = 1 / counts[numbers]
    cache = np.repeat(np.arange(len(lengths)), lengths)
    margins = []  # the group of each face, the share of each group
    if shares is not None:
        margins.append((cache, np.array(shares) / np.sum(shares)))
    if side_view_share is not None:
        yaws = poses[:, 0]
        if np.isnan(yaws).all():
            raise ValueError(
                "a share of side views (--side_view_share) needs head poses, which these caches lack: run `uiface"
                " prepare` of this version on the photographs, without --aligned, into a new folder."
            )
        sideways = (np.abs(yaws) > SIDE_VIEW).astype(int)
        margins.append((sideways, np.array([1 - side_view_share, side_view_share])))
    for _ in range(200):
        for groups, wanted in margins:
            totals = np.bincount(groups, weights, minlength=len(wanted))
            weights = weights * np.divide(wanted, totals, out=np.zeros(len(wanted)), where=totals > 0)[groups]
    for groups, wanted in margins:
        if not np.allclose(np.bincount(groups, weights, minlength=len(wanted)), wanted, atol=1e-3):
            of_caches = f"caches of {list(lengths)} faces"
            if side_view_share is not None:
                of_caches += f" with {np.bincount(cache, sideways, len(lengths)).astype(int).tolist()} side views"
            raise ValueError(
                f"the shares (--train_data_shares {shares}, --side_view_share {side_view_share}) cannot be had from"
                f" {of_caches}: choose others."
            )
    return torch.from_numpy(weights)


LR_SCHEDULERS = ("cosine_warm_restarts", "constant", "constant_with_warmup", "cosine", "linear")


def add_optimizer_arguments(
    group, learning_rate: float, lr_scheduler: str, lr_schedulers: Sequence[str] = LR_SCHEDULERS
) -> None:
    """The options that `make_lr_scheduler` reads, with a script's defaults and the schedules it knows."""
    group.add_argument("--learning_rate", type=real(0), default=learning_rate)
    group.add_argument("--lr_scheduler", choices=lr_schedulers, default=lr_scheduler)
    group.add_argument("--lr_warmup_steps", type=whole(0), default=0, help="of the schedules that have a warm-up")
    group.add_argument("--lr_restart_steps", type=whole(), default=10_000, help="T_0 of cosine_warm_restarts")
    group.add_argument("--lr_restart_factor", type=whole(), default=2, help="T_mult of cosine_warm_restarts")
    group.add_argument("--max_grad_norm", type=real(0), help="clip the gradient's norm")


def add_machine_arguments(parser: argparse.ArgumentParser):
    """The options of where and how a script computes; returns the group."""
    group = parser.add_argument_group("machine")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's")
    group.add_argument("--channels_last", **SWITCH, help="memory format of the convolutions")
    group.add_argument("--dataloader_num_workers", type=whole(0), default=0)
    group.add_argument("--seed", type=whole(0), default=0)
    return group


def add_checkpoint_arguments(parser: argparse.ArgumentParser, steps: int):
    """The options of checkpoints, logs and validation, every `steps` steps by default; returns the group."""
    group = parser.add_argument_group("checkpoints, logs, validation")
    group.add_argument("--checkpointing_steps", type=whole(), default=steps)
    group.add_argument("--checkpoints_total_limit", type=whole(), default=2)
    group.add_argument("--resume_from_checkpoint", help="a checkpoint folder, or `latest`")
    group.add_argument("--report_to", default="tensorboard", help="an accelerate tracker, or `none`")
    group.add_argument("--logging_steps", type=whole(), default=50)
    group.add_argument("--validation_steps", type=whole(0), default=steps, help="0: no validation")
    return group


def add_hub_arguments(group, what: str) -> None:
    """The options of pushing `what` is trained."""
    group.add_argument("--push_to_hub", **SWITCH, help=f"upload the {what} at checkpoints and at the end")
    group.add_argument("--hub_model_id", help="ORGANISATION/NAME (default: the output folder's name, under one's own)")
    group.add_argument("--hub_private", **SWITCH, help="a new repository is private")
    group.add_argument("--license", help="for the model card")


def describe_recipe(script: str, args: argparse.Namespace, paths: Sequence[str]) -> str:
    """How a model was trained, for its card, in Markdown: the options of `script`, without the `paths` among them."""
    recipe = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str | list | dict)}
    lines = [f"    {name}: {value}" for name, value in recipe.items() if name not in paths]
    return "\n".join([f"`{script}` with", "", *lines])


def make_accelerator(args: argparse.Namespace, **options) -> Accelerator:
    """The accelerator of a script with the options of machine and checkpoints; begins to log."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        # the other processes wait while the first one encodes, checks or evaluates
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
        project_config=ProjectConfiguration(
            project_dir=str(args.output_dir), logging_dir=str(args.output_dir / "logs")
        ),
        **options,
    )
    if accelerator.device.type == "cuda" and accelerator.mixed_precision != "no":
        # what is left in float32 then takes TF32 products, too
        torch.set_float32_matmul_precision("high")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return accelerator


@contextmanager
def training_folder(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Makes the folder of a training. Within it, no other training can work there: both would write one checkpoint.

    Raises:
        ValueError: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not accelerator.is_main_process:
        yield
        return
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"another training works in {folder}: wait for it, or choose another --output_dir."
        ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def compiled(accelerator: Accelerator, function: Callable) -> Callable:
    """A function or frozen module as `Accelerator.prepare` compiles the trained model: by the backend of
    `ACCELERATE_DYNAMO_BACKEND` or `accelerate config`; itself where there is none."""
    plugin = accelerator.state.dynamo_plugin
    return function if plugin.backend == DynamoBackend.NO else torch.compile(function, **plugin.to_kwargs())


def is_due(step: int, every: int) -> bool:
    """Whether something is done after this step that is done every so many; 0: never."""
    return every > 0 and step % every == 0


def validates(step: int, args: argparse.Namespace, stop: bool = False) -> bool:
    """Whether a step is followed by validation: every so many, and the last one, where any is wanted."""
    last = stop or step == args.max_train_steps
    return args.validation_steps > 0 and (last or is_due(step, args.validation_steps))


def is_out_of_time(accelerator: Accelerator, hours: float, max_hours: float | None) -> bool:
    """Whether a run of `hours` is to stop; the main process decides for all."""
    if max_hours is None or accelerator.num_processes == 1:
        return max_hours is not None and hours > max_hours
    late = torch.tensor(float(hours > max_hours and accelerator.is_main_process), device=accelerator.device)
    return bool(accelerator.reduce(late, "sum"))


@functools.lru_cache(maxsize=8)
def facial_feature_weights(size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Where an aligned face's error matters most: eyes and mouth by the five-point template of ArcFace, `(size, size)`
    with mean 1."""
    # two eyes, the mouth's corners and middle, in pixels of 112x112 (Deng et al. 2019)
    points = torch.tensor([[38.3, 51.7], [73.5, 51.5], [41.5, 92.4], [56.1, 92.3], [70.7, 92.2]], device=device)
    side = (torch.arange(size, device=device) + 0.5) * 112 / size
    across, down = (side[None, :, None] - points[:, 0]), (side[:, None, None] - points[:, 1])
    weights = 1 + 3 * torch.exp(-(across**2 + down**2) / (2 * 8.0**2)).amax(dim=-1)
    return weights / weights.mean()


def make_lr_scheduler(args, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule over `args.max_train_steps` optimizer steps. To be stepped once per step, whatever the number of
    processes: it is not given to `Accelerator.prepare`."""
    if args.lr_scheduler == "cosine_warm_restarts":
        return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
            optimizer, T_0=args.lr_restart_steps, T_mult=args.lr_restart_factor
        )
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )


@contextmanager
def ema_weights(ema: EMAModel, module: nn.Module) -> Iterator[None]:
    """Within it, `module` has the averaged weights and is in eval mode."""
    training = module.training
    ema.store(module.parameters())
    ema.copy_to(module.parameters())
    module.eval()
    try:
        yield
    finally:
        ema.restore(module.parameters())
        module.train(training)


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
            f"{output_dir} has {[p.name for p in later]}: go on with --resume_from_checkpoint latest, delete"
            " them, or choose another --output_dir."
        )
    return path


def schedule_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that the learning rate's schedule reads: a resumed run has to share them, except for
    `max_train_steps`, which `load_checkpoint` only warns of."""
    names = ["learning_rate", "lr_scheduler"]
    if args.lr_scheduler == "cosine_warm_restarts":
        names += ["lr_restart_steps", "lr_restart_factor"]
    elif args.lr_scheduler != "constant":
        names.append("lr_warmup_steps")
    if args.lr_scheduler in ("cosine", "linear"):
        names.append("max_train_steps")
    if args.lr_scheduler == "multi_step":
        names += ["lr_milestones", "lr_decay"]
    return {name: getattr(args, name) for name in names}


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


def load_checkpoint(
    accelerator: Accelerator, ema: EMAModel | None, checkpoint: Path, fixed: dict
) -> tuple[int, float]:
    """Restores the state of a checkpoint, with the averaged weights if there are any. Warns if `max_train_steps` is
    among the settings and has changed: trainings are extended, but the learning rate jumps.

    Returns:
        Its step, and the hours that it took to come there.

    Raises:
        ValueError: a setting has changed since, by which the order of the data would be another (some faces would be
            seen twice, others never), or which the checkpoint's state would silently overrule.
    """
    state = _read_state(checkpoint)
    before, fixed = state.get("fixed", {}), json.loads(json.dumps(fixed))
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
            " earlier ones, or begin in another --output_dir."
        )
    accelerator.load_state(checkpoint)
    if ema is not None:
        shadow = read_safetensors(checkpoint / "ema.safetensors")
        for i, parameter in enumerate(ema.shadow_params):
            parameter.copy_(shadow[str(i)])
        ema.optimization_step = state["ema_step"]
    return state["step"], state["hours"]
