import argparse

from .options import path
from .shared import Commands, add_command


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "card",
        run,
        help="print what the card of a data set says of its origin, and what is missing",
        description="Reads the header of DATASET/README.md: the license, and under `lineage` the generator with its"
        " license and training data, the encoder and its license, the identities, the leakage audit. `uiface generate`"
        " writes what the model's card says, `uiface audit` its result. Write the rest into the header: it stays there"
        " when the card is made anew.",
        examples="""
            uiface card data
        """,
    )
    parser.add_argument("dataset", metavar="DATASET", type=path, help="folder with a README.md, or the file itself")


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.hub.lineage import describe_lineage

    for line in describe_lineage(args.dataset):
        print(line)
