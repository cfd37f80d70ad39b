import argparse
from pathlib import Path
from typing import Any

from .options import path, real, whole
from .shared import ALIGNED, Commands, add_command, add_encoder_arguments, face_encoder, print_left_out


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "prepare",
        run,
        help="align and embed photographs, once",
        description="Aligns and embeds the faces in photographs and keeps them in a cache, for training and measuring."
        " Run the same command again to continue. SOURCE is a folder ROOT/IDENTITY/*.jpg, InsightFace's RecordIO"
        " (train.rec and train.idx), webdataset shards (*.tar), parquet files, LMDB, zip archives, a data set of"
        " `uiface generate`, or a cache.",
        examples="""
            # photographs of people, one folder per person
            uiface prepare photos --output cache/photos --encoder buffalo_l

            # faces that are aligned to 112x112 already, such as InsightFace's data sets
            uiface prepare faces_webface_112x112/train.rec --output cache/webface --aligned

            # only the people on a list, without faces that look like somebody else's
            uiface prepare lfw --output cache/lfw --identities peopleDevTrain.txt --drop-outliers
        """,
    )
    parser.add_argument("source", metavar="SOURCE", type=path, help="folder, train.rec or tar shards")
    parser.add_argument("--output", type=path, required=True, metavar="FOLDER", help="folder of the cache")
    add_encoder_arguments(parser)
    parser.add_argument(
        "--image-size",
        type=whole(),
        default=128,
        metavar="PIXELS",
        help="side of the stored faces (default: %(default)s)",
    )
    parser.add_argument(
        "--face",
        choices=("largest", "central"),
        default="largest",
        help="which face of a photograph with several (default: %(default)s)",
    )
    parser.add_argument("--aligned", action="store_true", help=ALIGNED)
    parser.add_argument(
        "--identities", type=path, metavar="FILE", help="take only these identities: a text file, one name per line"
    )
    parser.add_argument(
        "--min-images",
        type=whole(),
        default=1,
        metavar="NUMBER",
        help="leave out identities with fewer photographs (default: %(default)s)",
    )
    parser.add_argument(
        "--outlier-threshold",
        type=real(-1, 1),
        default=0.2,
        metavar="COSINE",
        help="a face is an outlier below this cosine to the median of its identity's embeddings"
        " (default: %(default)s)",
    )
    parser.add_argument("--drop-outliers", action="store_true", help="leave outliers out")
    parser.add_argument(
        "--min-in-frame",
        type=real(0, 1),
        metavar="SHARE",
        help="skip a face if less than this share of its aligned picture lies within the photograph",
    )
    parser.add_argument(
        "--threads",
        type=whole(),
        default=1,
        metavar="NUMBER",
        help="photographs at the same time (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.data import prepare_faces

    identities = None if args.identities is None else read_names(args.identities)
    report = prepare_faces(
        args.source,
        args.output,
        face_encoder(args, threads=1 if args.threads > 1 else None),
        image_size=args.image_size,
        face=args.face,
        aligned=args.aligned,
        identities=identities,
        min_images=args.min_images,
        outlier_threshold=args.outlier_threshold,
        drop_outliers=args.drop_outliers,
        min_in_frame=args.min_in_frame,
        threads=args.threads,
    )
    print_report(report, args)


def read_names(file: Path) -> list[str]:
    """The identities of a list. LFW's lists have their length in the first line, and a tab and a count behind every
    name."""
    from uiface_diffusers.files import read_lines

    lines = [line for line in read_lines(file) if line.strip()]
    has_length = any("\t" in line for line in lines) and "\t" not in lines[0]
    names = [line.split("\t")[0].strip() for line in lines[has_length:]]
    if not names:
        raise ValueError(f"{file} names no identities.")
    return names


def print_report(report: dict[str, Any], args: argparse.Namespace) -> None:
    from uiface_diffusers.faces import SIDE_VIEW

    print(f"{report['faces']} faces of {report['identities']} identities from {report['photographs']} photographs")
    for reason, count in report["reasons"].items():
        print(f"  skipped {count}: {reason}")
    if report["poses_known"]:
        print(f"  {report['side_views']} of {report['poses_known']} look sideways (|yaw| > {SIDE_VIEW})")
        below = ", ".join(f"{share}: {count}" for share, count in report["in_frame_below"].items())
        print(f"  faces by the share of the aligned picture within the photograph, below {below}")
    else:
        print("  head poses are not known: kept for photographs in which this version detected the face")
    print(f"  {len(report['several_faces'])} photographs have several faces: the {args.face} one was taken")
    print(f"  {len(report['duplicates'])} are duplicates (kept)")
    state = "left out" if args.drop_outliers else "kept; --drop-outliers leaves them out"
    outliers, threshold = len(report["outliers"]), args.outlier_threshold
    print(f"  {outliers} have a cosine below {threshold} to the median of their identity ({state})")
    print_left_out(report["left_out"])
    print(f"  files by name: {args.output / 'report.json'}")
