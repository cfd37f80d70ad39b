import argparse

from .options import path
from .shared import Commands, add_command


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "compare",
        run,
        help="put reports of `uiface evaluate` side by side",
        description="Prints the measures of several reports of `uiface evaluate` side by side.",
        examples="""
            uiface compare evaluation/one evaluation/two --output comparison
        """,
    )
    parser.add_argument(
        "reports", type=path, nargs="+", metavar="REPORT", help="two or more folders with report.json, or such files"
    )
    parser.add_argument("--output", type=path, metavar="FOLDER", help="folder for comparison.html and comparison.json")


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.evaluation import compare_reports, load_report

    comparison = compare_reports([load_report(report) for report in args.reports])
    for line in comparison.lines():
        print(line)
    if args.output is not None:
        comparison.write(args.output)
        print(f"written to {args.output / 'comparison.html'} and comparison.json")
