import argparse
from pathlib import Path

from .options import path, whole
from .shared import Commands, add_command


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "browse",
        run,
        help="write a page to look through the images of a data set",
        description="Writes one page with thumbnails of a data set: identities in rows, filtered and sorted by"
        " similarity, boundary and pose where the data set has them. The page needs no other file and no server.",
        examples="""
            # then open gallery/faces.html
            uiface browse faces

            # a cache of photographs, by pose
            uiface browse cache/photos --output photos.html
        """,
    )
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        type=path,
        help="a set in any form of `uiface convert`, or a cache of `uiface prepare`",
    )
    parser.add_argument("--output", type=path, metavar="FILE", help="the page (default: gallery/NAME.html)")
    parser.add_argument(
        "--thumbnail",
        type=whole(),
        default=80,
        metavar="PIXELS",
        help="side of the thumbnails (default: %(default)s)",
    )
    parser.add_argument(
        "--max-images",
        type=whole(),
        default=20_000,
        metavar="NUMBER",
        help="of a larger data set, whole identities are drawn (default: %(default)s)",
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="of that draw (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.gallery import write_gallery

    output = args.output or Path("gallery") / f"{args.dataset.resolve().name}.html"
    write_gallery(args.dataset, output, args.thumbnail, args.max_images, args.seed, log=print)
    print(f"written to {output}: open it in a browser")
