"""The `uiface` command line: one module per command, with its options and a `run` that calls the package.

`uiface_diffusers` is imported only when a command runs, so that `--help` and mistakes in options take no seconds.
"""

import argparse
import sys

from . import (
    audit,
    bench,
    browse,
    calibrate,
    card,
    clean,
    compare,
    convert,
    convert_original,
    demo,
    evaluate,
    generate,
    identify,
    identities,
    make_benchmark,
    make_pack,
    poses,
    prepare,
    verify,
)
from .options import complaint, expand_home, with_hyphens

COMMANDS = (
    demo,
    prepare,
    convert,
    clean,
    generate,
    calibrate,
    browse,
    card,
    identities,
    audit,
    make_benchmark,
    verify,
    identify,
    poses,
    convert_original,
    evaluate,
    compare,
    make_pack,
    bench,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uiface",
        description="Face recognition data from two-stage, identity-conditioned diffusion: prepare photographs,"
        " generate data sets, measure them.",
        epilog="`uiface COMMAND --help` explains a command and has examples.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs a command. What a user can mend ends it with a message and exit code 1, not with a traceback."""
    args = build_parser().parse_args(with_hyphens(expand_home(argv)))
    try:
        args.run(args)
    except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"uiface {args.command}: {complaint(error)}")
