import argparse

from ..options import path
from ..shared import Commands, add_command


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "inspect",
        run,
        help="show similarities, duplicates and the nearest known identity",
        description="Shows how similar the identities of a bank are to each other, and to known ones.",
        examples="""
            uiface identities inspect bank.safetensors
            uiface identities inspect bank.safetensors --against cache/photos --plot similarities.png
        """,
    )
    parser.add_argument("bank", metavar="BANK", type=path, help="a bank, or a cache of `uiface prepare`")
    parser.add_argument("--against", type=path, metavar="BANK", help="bank or cache of known identities")
    parser.add_argument("--plot", type=path, metavar="FILE", help="save the histogram as a picture")


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.banks import load_bank
    from uiface_diffusers.identities import inspect_bank, text_histogram

    bank = load_bank(args.bank)
    known = None if args.against is None else load_bank(args.against)
    report = inspect_bank(bank, known)
    each = "" if bank.images is None else f", {bank.images} embeddings of each"
    print(f"{len(bank)} identities of `{bank.identity_encoder}`, {bank.embeddings.shape[-1]}-d{each}")
    histograms = {"nearest other identity": report.nearest_other}
    if report.nearest_known is not None:
        histograms[f"nearest of {args.against}"] = report.nearest_known
    for title, values in histograms.items():
        print(f"cosine to the {title}: mean {values.mean():.3f}, largest {values.max():.3f}")
        print("\n".join("  " + line for line in text_histogram(values)))
    for first, second, cosine in report.duplicates:
        print(f"duplicate: {first} and {second}, {cosine:.4f}")
    if report.nearest_known is not None:
        position = int(report.nearest_known.argmax())
        name = bank.one_per_row().names[position]
        print(f"nearest: {name} to {report.known_names[position]}, {report.nearest_known.max():.4f}")
    if args.plot is not None:
        from uiface_diffusers.evaluation.plots import plot_histograms

        plot_histograms({title: values.numpy() for title, values in histograms.items()}, "cosine").savefig(args.plot)
        print(f"histogram saved to {args.plot}")
