import argparse

from ..options import path, real, whole
from ..shared import Commands, add_command


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "perturb",
        run,
        help="turn every identity by a random angle (IDperturb)",
        description="Turns every identity of a bank by a random angle in a random direction (IDperturb, CVPR 2026).",
        examples="""
            uiface identities perturb bank.safetensors --cosine 0.6 1.0 --output perturbed.safetensors
        """,
    )
    parser.add_argument("bank", metavar="BANK", type=path, help="a bank, or a cache of `uiface prepare`")
    parser.add_argument(
        "--cosine",
        type=real(-1, 1),
        nargs=2,
        default=(0.6, 1.0),
        metavar=("A", "B"),
        help="draw the cosine to the given identity from A to B (default: 0.6 1.0)",
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="default: %(default)s")
    parser.add_argument("--output", type=path, required=True, metavar="FILE", help="the new bank, .safetensors")


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.banks import load_bank, perturb_identities

    bank, cosines = perturb_identities(load_bank(args.bank), tuple(args.cosine), args.seed)
    bank.save(args.output)
    print(f"{len(bank)} identities saved to {args.output}, mean cosine to the given ones {cosines.mean():.3f}")
