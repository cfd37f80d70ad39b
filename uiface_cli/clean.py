import argparse
from pathlib import Path

from .options import path, real
from .shared import Commands, add_command, add_encoder_arguments, face_encoder


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "clean",
        run,
        help="list images that do not belong in a data set, and write it without them",
        description="Looks for copies of an image (encoded again, resized, mirrored, cropped a little), images of"
        " another person than their identity, and identities that are one person, by the encoder. Lists each with the"
        " number that decided. DATASET stays as it is. Run the same command again to continue.",
        examples="""
            # only the list
            uiface clean data --encoder buffalo_l --list data.csv

            # also the set without them, as RecordIO
            uiface clean faces_webface_112x112 --encoder buffalo_l --output webface_clean --format recordio
        """,
    )
    parser.add_argument(
        "dataset", metavar="DATASET", type=path, help="aligned faces in any form of `uiface convert`, or a cache"
    )
    parser.add_argument(
        "--list",
        type=path,
        default=Path("cleaning.csv"),
        metavar="FILE",
        help="the list, .csv or .parquet (default: %(default)s)",
    )
    parser.add_argument("--output", type=path, metavar="FOLDER", help="write the set without them")
    parser.add_argument(
        "--format",
        choices=("imagefolder", "recordio", "webdataset", "parquet", "lmdb", "zip"),
        default="imagefolder",
        help="the form of --output; lmdb needs the package lmdb (default: %(default)s)",
    )
    add_threshold_arguments(parser)
    add_encoder_arguments(parser)


def add_threshold_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("thresholds")
    group.add_argument(
        "--stranger-cosine",
        type=real(-1, 1),
        metavar="COSINE",
        help="a stranger has a smaller mean cosine to the other images of the identity (default: what 99 %% of the"
        " set's images stay below with another identity)",
    )
    group.add_argument(
        "--twin-cosine",
        type=real(-1, 1),
        metavar="COSINE",
        help="two identities are one person if their images have at least this mean cosine (default: what 99 %% of the"
        " set's identities reach within themselves)",
    )
    copies = "(default: what 99 %% of copies reach that are made of faces of the set)"
    group.add_argument(
        "--duplicate-distance",
        type=real(0, 1),
        metavar="DISTANCE",
        help=f"share of a picture that its copy may leave unexplained {copies}",
    )
    group.add_argument(
        "--duplicate-cosine", type=real(-1, 1), metavar="COSINE", help=f"the least cosine of two copies {copies}"
    )


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.evaluation.cleaning import clean_dataset

    clean_dataset(
        args.dataset,
        face_encoder(args),
        args.list,
        args.output,
        args.format,
        duplicate_distance=args.duplicate_distance,
        duplicate_cosine=args.duplicate_cosine,
        stranger_cosine=args.stranger_cosine,
        twin_cosine=args.twin_cosine,
        log=print,
    )
