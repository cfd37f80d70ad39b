import argparse

from ..options import path
from ..shared import Commands, add_command


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "import",
        run,
        help="make a bank of published embeddings",
        description="Makes a bank of embeddings in .npy, .npz, .pt (of nothing but tensors) or .safetensors, with one"
        " row per identity. Nothing in the file is executed.",
        examples="""
            uiface identities import identities.npy --encoder elasticface --output bank.safetensors
        """,
    )
    parser.add_argument("file", metavar="FILE", type=path, help="(N, identity_dim) floating point numbers")
    parser.add_argument("--encoder", required=True, metavar="NAME", help="the recognizer that made them")
    parser.add_argument("--key", metavar="NAME", help="which array, if the file has several")
    parser.add_argument("--output", type=path, required=True, metavar="FILE", help="the bank, .safetensors")


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.identities import import_identities

    bank, report = import_identities(args.file, args.encoder, args.key)
    bank.save(args.output)
    print(f"{report['identities']} identities of `{args.encoder}`, {report['dimension']}-d, saved to {args.output}")
    print(f"  {report['not of unit length']} were not of unit length: normalized")
    duplicates = list(report["duplicates"].items())
    print(f"  {len(duplicates)} are duplicates (kept)")
    for name, first in duplicates[:10]:
        print(f"    {name} of {first}")
