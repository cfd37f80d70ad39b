import argparse
from pathlib import Path

from .options import device, path, real, whole
from .shared import Commands, add_command, add_encoder_arguments, encoder_settings, face_encoder


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "evaluate",
        run,
        help="measure realism, diversity, consistency, separability and leakage of a data set",
        description="Measures a data set of aligned faces: of `uiface generate` or `uiface prepare`, identity folders,"
        " RecordIO, webdataset shards, parquet files, LMDB or zip archives. Run the same command again to continue.",
        examples="""
            # against real faces, with a second recognizer that the generator has not seen
            uiface evaluate data --encoder buffalo_l --judge antelopev2 --real cache/photos

            # also look for people of the training data
            uiface evaluate data --real cache/photos --against cache/photos --output evaluation/data
        """,
    )
    parser.add_argument("dataset", metavar="DATASET", type=path, help="folder, train.rec or tar shards")
    parser.add_argument(
        "--output", type=path, metavar="FOLDER", help="folder of the report (default: evaluation/NAME)"
    )
    add_encoder_arguments(parser)
    parser.add_argument("--judge", metavar="PACK", help="second model pack, which the generator has not seen")
    add_comparison_arguments(parser)
    add_measure_arguments(parser)


def add_comparison_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--identities", type=path, metavar="BANK", help="bank that the faces follow (default: the data set's own)"
    )
    parser.add_argument(
        "--against", type=path, metavar="REAL", help="bank or cache of real people, to look for leakage"
    )
    parser.add_argument(
        "--real",
        type=path,
        action="append",
        metavar="FACES",
        help="real faces for KID, the classifier test, precision and recall: a data set in any of the forms, or a"
        " folder of pictures. Give it again for another set: equal parts are taken of all",
    )
    parser.add_argument(
        "--same-people",
        action="store_true",
        help="a name is the same person in both sets: measure precision and recall within identities, too",
    )


def add_measure_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features",
        choices=("lpips", "encoder", "vgg16", "inception_v3"),
        default="lpips",
        help="of precision and recall (default: %(default)s, the backbone of LPIPS)",
    )
    parser.add_argument(
        "--feature-weights", type=path, metavar="FILE", help="safetensors of torchvision's vgg16 or inception_v3"
    )
    parser.add_argument(
        "--neighbors", type=whole(), default=3, metavar="K", help="of precision and recall (default: %(default)s)"
    )
    parser.add_argument(
        "--max-images",
        type=whole(),
        default=50_000,
        metavar="NUMBER",
        help="of each set, for precision and recall (default: %(default)s)",
    )
    parser.add_argument(
        "--lpips-network",
        choices=("alex", "squeeze", "vgg"),
        default="alex",
        help="network of LPIPS (default: %(default)s)",
    )
    parser.add_argument(
        "--lpips-backbone",
        type=path,
        metavar="FILE",
        help="safetensors of its convolutions (default: torchvision's, downloaded)",
    )
    parser.add_argument(
        "--lpips-pairs",
        type=whole(0),
        default=20,
        metavar="NUMBER",
        help="pairs of images of each identity; 0 for all (default: %(default)s)",
    )
    parser.add_argument(
        "--max-pairs",
        type=whole(),
        default=1_000_000,
        metavar="NUMBER",
        help="genuine and impostor pairs at most (default: %(default)s)",
    )
    parser.add_argument(
        "--threshold",
        type=real(-1, 1),
        default=0.3,
        metavar="COSINE",
        help="from which two faces are one person's (default: %(default)s)",
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="of all draws (default: %(default)s)")
    parser.add_argument("--device", type=device, default="cpu", help="of LPIPS and features (default: %(default)s)")
    parser.add_argument(
        "--skip-unusable", action="store_true", help="leave out pictures that cannot be read or are not square"
    )


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.banks import load_bank
    from uiface_diffusers.evaluation import TorchvisionFeatures, evaluate_dataset, load_lpips
    from uiface_diffusers.faces import FaceEncoder
    from uiface_diffusers.identities import IDENTITIES

    # a data set of `uiface generate` has the bank that it follows
    own = args.dataset / IDENTITIES
    bank = args.identities or (own if own.is_file() else None)
    features = args.features
    if features in ("vgg16", "inception_v3"):
        features = TorchvisionFeatures(features, args.feature_weights)
    output = args.output or Path("evaluation") / args.dataset.resolve().name
    evaluate_dataset(
        args.dataset,
        output,
        face_encoder(args),
        judge=None if args.judge is None else FaceEncoder(args.judge, **encoder_settings(args)),
        identities=None if bank is None else load_bank(bank),
        against=None if args.against is None else load_bank(args.against),
        real=args.real,
        same_people=args.same_people,
        features=features,
        perceptual=load_lpips(args.lpips_network, args.lpips_backbone),
        lpips_pairs=args.lpips_pairs or None,
        neighbors=args.neighbors,
        threshold=args.threshold,
        max_pairs=args.max_pairs,
        max_images=args.max_images,
        seed=args.seed,
        device=args.device,
        skip_unusable=args.skip_unusable,
        log=print,
    )
    print(f"written to {output / 'report.html'} and report.json")
