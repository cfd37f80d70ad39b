"""`uiface identities ...`: commands about banks of identities."""

from ..shared import Commands, add_command
from . import import_bank, inspect_bank, make, perturb


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "identities",
        None,
        help="make, import, perturb and inspect banks of identities",
        description="A bank is a safetensors file with the names of identities and one embedding of each.",
        examples="""
            uiface identities make org/model --number 1000 --output bank.safetensors
            uiface identities inspect bank.safetensors
        """,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action in (make, import_bank, perturb, inspect_bank):
        action.add(actions)
