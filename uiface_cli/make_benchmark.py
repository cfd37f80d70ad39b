import argparse

from .options import path
from .shared import ALIGNED, Commands, add_command, add_encoder_arguments, face_encoder


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "make-benchmark",
        run,
        help="make a verification benchmark of photographs and a list of pairs",
        description="Aligns the faces of a list of pairs (LFW's pairs.txt, or another list of names or paths) and"
        " saves them in InsightFace's form, .bin, for `uiface verify`.",
        examples="""
            uiface make-benchmark --pairs lfw/pairs.txt --images lfw/images --output bins/lfw.bin
        """,
    )
    parser.add_argument("--pairs", type=path, required=True, metavar="FILE", help="list of pairs")
    parser.add_argument(
        "--images", type=path, required=True, metavar="FOLDER", help="folder in which the list's paths begin"
    )
    parser.add_argument("--output", type=path, required=True, metavar="FILE", help="the benchmark, .bin")
    parser.add_argument("--aligned", action="store_true", help=ALIGNED)
    add_encoder_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.data import make_benchmark

    report = make_benchmark(args.pairs, args.images, args.output, None if args.aligned else face_encoder(args))
    print(f"{report['pairs']} pairs of {report['photographs']} photographs saved to {args.output}")
    if not args.aligned:
        print(f"  {report['several_faces']} photographs have several faces: the central one was taken")
        print(f"  {len(report['without_face'])} show none: the square about their center was taken")
    for name in report["without_face"]:
        print(f"    {name}")
