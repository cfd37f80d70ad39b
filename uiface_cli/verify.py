import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .options import device, path
from .protocols import add_protocol_arguments, check_protocols, measure_protocols, verify_by_templates
from .shared import ALIGNED, Commands, add_command, add_encoder_arguments, face_encoder

if TYPE_CHECKING:
    from uiface_diffusers.evaluation import VerificationResult


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "verify",
        run,
        help="measure a face recognizer",
        description="Measures verification accuracy on ten folds, equal error rate and true accept rates, with 95 %"
        " intervals.",
        examples="""
            # an insightface model pack on all .bin files of a folder
            uiface verify buffalo_l --benchmarks bins --output results

            # a recognizer of training/train_face_recognition.py
            uiface verify runs/recognizer --benchmarks bins/lfw.bin

            # photographs and a list of pairs, without a benchmark's file
            uiface verify buffalo_l --pairs lfw/pairs.txt --images lfw/images
        """,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="insightface model pack; or a recognizer's folder or Hub repository ORG/NAME"
    )
    parser.add_argument("--benchmarks", type=path, metavar="PATH", help="folder of .bin files, or one of them")
    parser.add_argument(
        "--pairs", type=path, metavar="FILE", help="instead of --benchmarks: a list of pairs, with --images"
    )
    parser.add_argument("--images", type=path, metavar="FOLDER", help="folder in which the list's paths begin")
    parser.add_argument("--aligned", action="store_true", help=ALIGNED)
    parser.add_argument("--output", type=path, metavar="FOLDER", help="folder for verification.json and roc.png")
    parser.add_argument(
        "--device", type=device, help="of a model that is no model pack (default: a GPU if there is one)"
    )
    add_encoder_arguments(parser, help="insightface model pack whose detector aligns --images (default: %(default)s)")
    add_protocol_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if args.templates is not None:
        return verify_by_templates(args)
    from uiface_diffusers.data import read_pairs
    from uiface_diffusers.data.benchmarks import read_benchmarks
    from uiface_diffusers.data.pairs import check_pairs
    from uiface_diffusers.evaluation import load_recognizer, save_verification, verification_table, verify_benchmarks

    if (args.benchmarks is None) == (args.pairs is None) or (args.pairs is None) != (args.images is None):
        raise ValueError("give either --benchmarks, or --pairs with --images.")
    check_protocols(args)
    if args.output is not None:
        import matplotlib  # noqa: F401  what is not installed is named before the work

        args.output.mkdir(parents=True, exist_ok=True)
    if args.pairs is not None:
        check_pairs(args.pairs, [pair.same for pair in read_pairs(args.pairs)])
    recognizer = load_recognizer(args.model, args.encoder_root, args.providers, args.device)

    def save(results: "dict[str, VerificationResult]") -> None:
        if args.output is not None:
            save_verification(results, recognizer.name, args.output)

    with benchmarks(args) as files:
        read = read_benchmarks(files)
    results = verify_benchmarks(recognizer, read, done=save)
    print(verification_table(results))
    measure_protocols(args, recognizer, read, results)
    if args.output is not None:
        print(f"figures and curves saved to {args.output}")


@contextmanager
def benchmarks(args: argparse.Namespace) -> Iterator[Path]:
    """The given benchmarks, or one of the given pairs, which is deleted again."""
    from uiface_diffusers.data import make_benchmark

    if args.pairs is None:
        yield args.benchmarks
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{args.pairs.stem}.bin"
        make_benchmark(args.pairs, args.images, file, None if args.aligned else face_encoder(args, device=args.device))
        yield file
