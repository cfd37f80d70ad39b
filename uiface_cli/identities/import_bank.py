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
        " row per identity, or with an embedding for each image of an identity. Nothing in the file is executed.",
        examples="""
            uiface identities import identities.npy --encoder elasticface --output bank.safetensors

            # an embedding per image, such as FaceFlow's: (identities, images, 512)
            uiface identities import contexts.npy --identity-ids identity_ids.npy --encoder elasticface \\
                --output bank.safetensors
        """,
    )
    parser.add_argument(
        "file", metavar="FILE", type=path, help="(N, identity_dim) or (N, images, identity_dim) numbers"
    )
    parser.add_argument("--encoder", required=True, metavar="NAME", help="the recognizer that made them")
    parser.add_argument("--key", metavar="NAME", help="which array, if the file has several")
    parser.add_argument(
        "--identity-ids", type=path, metavar="FILE", help=".npy of the rows' ids; rows of one id are one identity"
    )
    parser.add_argument("--output", type=path, required=True, metavar="FILE", help="the bank, .safetensors")


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.identities import import_identities

    bank, report = import_identities(args.file, args.encoder, args.key, args.identity_ids)
    bank.save(args.output)
    each = "" if bank.images is None else f", {bank.images} embeddings of each"
    print(
        f"{report['identities']} identities of `{args.encoder}`, {report['dimension']}-d{each}, saved to {args.output}"
    )
    print(f"  {report['not of unit length']} were not of unit length: normalized")
    duplicates = list(report["duplicates"].items())
    print(f"  {len(duplicates)} are duplicates (kept)")
    for name, first in duplicates[:10]:
        print(f"    {name} of {first}")
