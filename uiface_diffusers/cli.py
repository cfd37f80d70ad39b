"""`uiface ...`: every command is one call of a function of this package."""

import argparse
import sys
from pathlib import Path


def _add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoder", default="buffalo_l", help="insightface model pack (default: %(default)s)")
    parser.add_argument("--encoder-root", default="~/.insightface", help="folder with models/PACK")
    parser.add_argument("--providers", nargs="+", help="onnxruntime execution providers")
    parser.add_argument("--det-size", type=int, help="side of the detector's input (default: insightface's choice)")


def _prepare(args: argparse.Namespace) -> None:
    from .data import prepare_faces
    from .faces import FaceEncoder

    identities = None
    if args.identities is not None:
        # LFW's lists have a count in the first line and behind every name
        identities = [line.split("\t")[0].strip() for line in args.identities.read_text().splitlines()]
        if identities and identities[0].isdigit() and not (args.source / identities[0]).exists():
            del identities[0]
        identities = [name for name in identities if name]
    report = prepare_faces(
        args.source,
        args.output,
        FaceEncoder(args.encoder, args.encoder_root, args.providers, args.det_size),
        image_size=args.image_size,
        face=args.face,
        aligned=args.aligned,
        identities=identities,
        min_images=args.min_images,
    )
    print(f"{report['faces']} faces of {report['identities']} identities from {report['photographs']} photographs")
    for reason, count in report["reasons"].items():
        print(f"  skipped {count}: {reason}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="uiface", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    prepare = commands.add_parser(
        "prepare",
        help="align and embed a folder of identities, once",
        description="Folder ROOT/IDENTITY/*.jpg -> cache of aligned, embedded faces. Run it again to go on.",
        epilog="example: uiface prepare photos --output cache/photos --encoder buffalo_l",
    )
    prepare.add_argument("source", type=Path, help="ROOT/IDENTITY/*.jpg")
    prepare.add_argument("--output", type=Path, required=True, help="the cache's folder")
    _add_encoder_arguments(prepare)
    prepare.add_argument("--image-size", type=int, default=128, help="side of the stored faces (default: %(default)s)")
    prepare.add_argument("--face", choices=("largest", "central"), default="largest", help="which of several faces")
    prepare.add_argument("--aligned", action="store_true", help="the files are aligned faces already: no detection")
    prepare.add_argument("--identities", type=Path, help="file with the folders to take, a name a line")
    prepare.add_argument("--min-images", type=int, default=1, help="leave out identities with fewer photographs")
    prepare.set_defaults(run=_prepare)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    try:
        args.run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"uiface {args.command}: {error}")


if __name__ == "__main__":
    main()
