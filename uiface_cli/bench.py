import argparse
import shlex
from pathlib import Path

from . import evaluate
from .options import expand_home, path, whole, with_hyphens
from .shared import Commands, add_command


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "bench",
        run,
        help="train a recognizer on each of several data sets and compare them",
        description="Trains a recognizer on each set under one recipe, with several seeds, and measures them on the"
        " same benchmarks: one table with means and standard deviations, bench.md and bench.json. Run the same command"
        " to continue; sets and seeds may be added.",
        examples="""
            # two sets in any of the forms that training takes
            uiface bench dcface/train.rec mine=data --recipe training/configs/fr_ir50_arcface.yaml \\
                --benchmarks bins --output bench

            # also measure the sets themselves
            uiface bench data other --recipe recipe.yaml --benchmarks bins --seeds 0 1 --output bench \\
                --evaluate "--encoder buffalo_l --real cache/photos"
        """,
    )
    parser.add_argument(
        "sets", nargs="+", metavar="SET", help="in any form of `uiface convert`, or a cache; PATH or NAME=PATH"
    )
    parser.add_argument(
        "--recipe",
        type=path,
        required=True,
        metavar="FILE",
        help="YAML file of options of training/train_face_recognition.py",
    )
    parser.add_argument(
        "--benchmarks", type=path, required=True, metavar="PATH", help="folder of .bin files, or one of them"
    )
    parser.add_argument("--output", type=path, required=True, metavar="FOLDER", help="folder of table and recognizers")
    parser.add_argument(
        "--seeds", type=whole(0), nargs="+", default=(0, 1, 2), help="of the trainings of a set (default: 0 1 2)"
    )
    parser.add_argument(
        "--evaluate",
        metavar="OPTIONS",
        help="measure each set by `uiface evaluate` with these options, in quotation marks. Reports that are in"
        " FOLDER/NAME/evaluation are in the table without it, too",
    )


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.training.bench import PAGE, run_bench

    words = [] if args.evaluate is None else with_hyphens(expand_home(shlex.split(args.evaluate)))
    evaluation_arguments(words, Path("-"), Path("-"))  # mistakes are named now

    def measure(dataset: Path, output: Path) -> None:
        evaluate.run(evaluation_arguments(words, dataset, output))

    given = None if args.evaluate is None else measure
    run_bench(args.sets, args.recipe, args.benchmarks, args.output, args.seeds, given)
    print((args.output / PAGE).read_text(encoding="utf-8"))


def evaluation_arguments(words: list[str], dataset: Path, output: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="uiface bench --evaluate")
    evaluate.add(parser.add_subparsers())
    return parser.parse_args(["evaluate", str(dataset), *words, "--output", str(output)])
