import argparse
from pathlib import Path

from .options import path, whole
from .shared import Commands, add_command, add_encoder_arguments, face_encoder


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "audit",
        run,
        help="look for people of the training data in a data set",
        description="Measures the cosine of every image and identity of a generated data set to the nearest real"
        " embedding, and the share above thresholds that are measured on real impostors.",
        examples="""
            # audit.png shows the 8 images that are nearest to a real face
            uiface audit data --against cache/photos
        """,
    )
    parser.add_argument(
        "dataset", metavar="DATASET", type=path, help="data set of `uiface generate`, or of identity folders"
    )
    parser.add_argument(
        "--against", type=path, required=True, metavar="REAL", help="cache of `uiface prepare`, or a bank"
    )
    parser.add_argument(
        "--worst", type=whole(0), default=8, metavar="NUMBER", help="pairs to show (default: %(default)s)"
    )
    parser.add_argument(
        "--plot",
        type=path,
        default=Path("audit.png"),
        metavar="FILE",
        help="picture of these pairs (default: %(default)s)",
    )
    add_encoder_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.banks import load_bank
    from uiface_diffusers.data import FaceCache
    from uiface_diffusers.evaluation.leakage import audit_dataset

    audit_dataset(
        args.dataset,
        face_encoder(args),
        load_bank(args.against),
        FaceCache(args.against) if args.against.is_dir() else None,
        args.plot,
        args.worst,
        log=print,
    )
