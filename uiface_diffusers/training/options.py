"""Options that the training scripts have in common, and recipes: YAML files with any of a script's options.

Options are documented with hyphens (`--train-data`); underscores (`--train_data`) mean the same, on the command line
and as keys of a recipe.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from uiface_cli.options import complaint, expand_home, real, whole, with_hyphens

from .schedules import LR_SCHEDULERS

# a parser or a group of its options
Options = argparse._ActionsContainer
# options that what is learned does not depend on, of any script
INDIFFERENT = {"config", "output_dir", "resume_from_checkpoint", "dataloader_num_workers", "checked_faces"}
INDIFFERENT |= {"checkpointing_steps", "checkpoints_total_limit", "snapshot_steps", "logging_steps", "report_to"}
INDIFFERENT |= {"validation_steps", "validation_data", "validation_faces", "validation_seeds", "benchmarks"}
INDIFFERENT |= {"validation_inference_steps", "push_to_hub", "hub_model_id", "hub_private", "license"}
# an option that the command line can also turn off, as --no-NAME
SWITCH: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": False}


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`: what a user can mend ends it with a message and exit code 1, not with a traceback."""
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {complaint(error)}")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of a script with recipes, for `parse_recipe`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file with any of the options below; the command line wins")
    return parser


def parse_recipe(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, required: Sequence[str] = ()
) -> argparse.Namespace:
    """Parses the command line of a script whose parser has a `--config`: a YAML file with any of its options. The
    command line wins; both are checked alike.

    Args:
        parser: the script's.
        argv: the command line; `sys.argv` if not given.
        required: options, as `--train-data`, that have to be given in one of the two places.
    """
    argv = with_hyphens(expand_home(argv))
    known, _ = parser.parse_known_args(argv)
    if known.config is not None:
        try:
            config = yaml.safe_load(known.config.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"--config {known.config} cannot be read: {error}")
        if not isinstance(config, dict):
            parser.error(f"--config {known.config} has to map names of options to values")
        names = Counter(str(name).replace("_", "-") for name in config)
        unknown = sorted(str(name) for name in config if str(name).replace("-", "_") not in vars(known))
        if unknown:
            parser.error(f"{known.config} has unknown options: {', '.join(unknown)}")
        twice = [name for name, number in names.items() if number > 1]
        if twice:
            parser.error(f"{known.config} has {twice[0]} twice, with hyphens and with underscores: delete one")
        # as if they stood in front on the command line, so that they are checked alike
        recipe = [word for name, value in config.items() for word in _option_words(name, value)]
        argv = expand_home(with_hyphens(recipe)) + argv
    args = parser.parse_args(argv)
    for option in required:
        if not getattr(args, option.removeprefix("--").replace("-", "_")):
            parser.error(f"{option} is required")
    return args


def _option_words(name: str, value: Any) -> list[str]:
    """An entry of the YAML file as words of the command line."""
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def add_length_arguments(
    group: Options, batch_size: int, steps: int | None, steps_help: str = "", accumulates: bool = True
) -> None:
    """The options of how much is trained, with a script's defaults.

    Args:
        accumulates: whether a step can be of several batches.
    """
    group.add_argument("--train-batch-size", type=whole(), default=batch_size, help="samples per batch and process")
    group.add_argument("--max-train-steps", type=whole(), default=steps, help=steps_help or None)
    group.add_argument("--max-train-hours", type=real(0), help="save and stop after this time in this run")
    if accumulates:
        group.add_argument(
            "--gradient-accumulation-steps", type=whole(), default=1, help="batches of one optimizer step"
        )


def add_optimizer_arguments(
    group: Options, learning_rate: float, lr_scheduler: str, lr_schedulers: Sequence[str] = LR_SCHEDULERS
) -> None:
    """The options that `make_lr_scheduler` reads, with a script's defaults and the schedules it knows."""
    group.add_argument("--learning-rate", type=real(0), default=learning_rate)
    group.add_argument("--lr-scheduler", choices=lr_schedulers, default=lr_scheduler)
    group.add_argument("--lr-warmup-steps", type=whole(0), default=0, help="of the schedules that have a warm-up")
    group.add_argument("--lr-restart-steps", type=whole(), default=10_000, help="T_0 of cosine_warm_restarts")
    group.add_argument("--lr-restart-factor", type=whole(), default=2, help="T_mult of cosine_warm_restarts")
    group.add_argument("--max-grad-norm", type=real(0), help="clip the gradient's norm")


def add_machine_arguments(parser: argparse.ArgumentParser) -> Options:
    """The options of where and how a script computes; returns the group."""
    group = parser.add_argument_group("machine")
    group.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), help="default: accelerate's")
    group.add_argument("--channels-last", **SWITCH, help="memory format of the convolutions")
    group.add_argument("--dataloader-num-workers", type=whole(0), default=0)
    group.add_argument("--seed", type=whole(0), default=0)
    return group


def add_checkpoint_arguments(parser: argparse.ArgumentParser, steps: int) -> Options:
    """The options of checkpoints, logs and validation, every `steps` steps by default; returns the group."""
    group = parser.add_argument_group("checkpoints, logs, validation")
    group.add_argument("--checkpointing-steps", type=whole(), default=steps)
    group.add_argument("--checkpoints-total-limit", type=whole(), default=2)
    group.add_argument("--resume-from-checkpoint", help="a checkpoint folder, or `latest`")
    group.add_argument("--report-to", default="tensorboard", help="an accelerate tracker, or `none`")
    group.add_argument("--logging-steps", type=whole(), default=50)
    group.add_argument("--validation-steps", type=whole(0), default=steps, help="0: no validation")
    return group


def add_hub_arguments(group: Options, what: str) -> None:
    """The options of pushing `what` is trained."""
    group.add_argument("--push-to-hub", **SWITCH, help=f"upload the {what} at checkpoints and at the end")
    group.add_argument("--hub-model-id", help="ORGANISATION/NAME (default: the output folder's name, under one's own)")
    group.add_argument("--hub-private", **SWITCH, help="a new repository is private")
    group.add_argument("--license", help="for the model card")


def describe_recipe(script: str, args: argparse.Namespace, paths: Sequence[str]) -> str:
    """How a model was trained, for its card, in Markdown: the options of `script`, without the `paths` among them."""
    recipe = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str | list | dict)}
    lines = [f"    {name}: {value}" for name, value in recipe.items() if name not in paths]
    return "\n".join([f"`{script}` with", "", *lines])
