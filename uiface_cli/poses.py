import argparse

from .options import path
from .shared import Commands, add_command


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "poses",
        run,
        help="head poses of a cache's faces, by group",
        description="Prints yaw and pitch of the faces of a cache of `uiface prepare`, from their landmarks.",
        examples="""
            # by groups of people that a file names
            uiface poses cache/photos --groups groups.csv
        """,
    )
    parser.add_argument("cache", type=path, metavar="CACHE", help="folder of `uiface prepare`")
    parser.add_argument("--groups", type=path, metavar="FILE", help="lines NAME,GROUP or FILE,GROUP")
    parser.add_argument("--output", type=path, metavar="FILE", help="the figures, .json")


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.data import FaceCache
    from uiface_diffusers.evaluation.groups import pose_lines, pose_statistics, read_groups
    from uiface_diffusers.files import check_no_folder, write_json

    if args.output is not None:
        check_no_folder(args.output)
    groups = None if args.groups is None else read_groups(args.groups)
    statistics = pose_statistics(FaceCache(args.cache), groups)
    print("\n".join(pose_lines(statistics)))
    if args.output is not None:
        write_json(args.output, statistics)
        print(f"figures saved to {args.output}")
