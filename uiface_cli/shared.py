"""What commands share."""

import argparse
import shutil
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .options import provider, whole

if TYPE_CHECKING:
    from uiface_diffusers.faces import CarriedEncoder, FaceEncoder

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

ALIGNED = "the pictures are aligned faces already: no detection"
MODEL = "pipeline: folder or Hub repository (default: the embedded checkpoint)"


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], None] | None,
    help: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Adds a command, or with `run=None` a group of them. Its help ends with runnable examples."""
    parser = commands.add_parser(
        name,
        help=help,
        description=textwrap.fill(description, shutil.get_terminal_size().columns - 2),
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_encoder_arguments(
    parser: argparse.ArgumentParser,
    default: str | None = "buffalo_l",
    help: str = "insightface model pack (default: %(default)s)",
) -> None:
    """The options of `face_encoder`."""
    parser.add_argument("--encoder", metavar="PACK", default=default, help=help)
    parser.add_argument(
        "--encoder-root",
        metavar="FOLDER",
        default="~/.insightface",
        help="folder that has models/PACK (default: %(default)s)",
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        type=provider,
        metavar="NAME",
        help="onnxruntime's execution providers: cuda, cpu, tensorrt, ... (default: a GPU if there is one)",
    )
    parser.add_argument(
        "--det-size",
        type=whole(32, multiple_of=32),
        metavar="PIXELS",
        help="side of the detector's input, a multiple of 32 (default: insightface's choice)",
    )


def encoder_settings(args: argparse.Namespace) -> Mapping[str, Any]:
    """What `add_encoder_arguments` adds beside the name of the pack."""
    return {"root": args.encoder_root, "providers": args.providers, "det_size": args.det_size}


def face_encoder(args: argparse.Namespace, **options: Any) -> "FaceEncoder":
    """The encoder that the options name."""
    from uiface_diffusers.faces import FaceEncoder

    return FaceEncoder(args.encoder, **encoder_settings(args), **options)


# of --encoder, in commands that name a model: the encoder that it carries
OF_THE_MODEL = "model"


def add_detector_argument(parser: argparse.ArgumentParser) -> None:
    """The option of `model_encoder`."""
    parser.add_argument(
        "--detector",
        metavar="PACK",
        help="insightface model pack that finds the faces in photographs for the encoder that the model carries",
    )


def model_encoder(args: argparse.Namespace, folder: Path) -> "CarriedEncoder | None":
    """The encoder that a model's folder carries, with the detector that the options name; `None` if it has none."""
    from uiface_diffusers.faces import CarriedEncoder, FaceEncoder, carried_encoder

    carried = carried_encoder(folder)
    if carried is None:
        if args.detector is not None:
            raise ValueError(f"--detector is for the encoder that a model carries: {folder} has none.")
        return None
    detector = None if args.detector is None else FaceEncoder(args.detector, **encoder_settings(args))
    return CarriedEncoder(carried, detector, args.device)


def print_left_out(left_out: Mapping[str, dict[str, Any]]) -> None:
    """Prints what was found beside the pictures of a set and not taken."""
    from uiface_diffusers.data.sources import describe_left_out

    for line in describe_left_out(left_out):
        print(f"  left out {line}")
