import argparse
from pathlib import Path

from .options import any_of, device, none, path, whole
from .shared import ALIGNED, Commands, add_command, add_encoder_arguments, face_encoder


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "identify",
        run,
        help="measure a face recognizer by open-set search in a gallery",
        description="Measures TPIR at FPIR 1 and 0.1 %, rank-k and the DET curve. Gallery and probes are in any form"
        " of `uiface prepare`, or lists of FILE,IDENTITY (.txt, .csv, .tsv). Probes of identities that are not in the"
        " gallery are the non-mated ones. With --output, run the same command again to continue.",
        examples="""
            # folders GALLERY/IDENTITY/*.jpg and PROBES/IDENTITY/*.jpg
            uiface identify buffalo_l --gallery gallery --probes probes --output results

            # lists of aligned faces; a mate counts at any rank
            uiface identify runs/recognizer --gallery gallery.csv --probes probes.csv --aligned --rank none
        """,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="insightface model pack; or a recognizer's folder or Hub repository ORG/NAME"
    )
    parser.add_argument("--gallery", type=path, required=True, metavar="PATH", help="photographs of enrolled people")
    parser.add_argument("--probes", type=path, required=True, metavar="PATH", help="other photographs, to search for")
    parser.add_argument("--aligned", action="store_true", help=ALIGNED)
    parser.add_argument(
        "--rank",
        type=any_of(whole(), none),
        default=1,
        help="a mate counts as found up to this rank; none: at any (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=path, metavar="FOLDER", help="folder for identification.json, det.png and the embeddings"
    )
    parser.add_argument(
        "--device", type=device, help="of a model that is no model pack (default: a GPU if there is one)"
    )
    add_encoder_arguments(
        parser, help="insightface model pack whose detector aligns the photographs (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.data.file_list import open_source_or_list
    from uiface_diffusers.evaluation import load_recognizer
    from uiface_diffusers.evaluation.embedding import embed_source
    from uiface_diffusers.evaluation.identification import check_mated, measure_identification, save_identification
    from uiface_diffusers.files import same_name

    if args.output is not None:
        import matplotlib  # noqa: F401  what is not installed is named before the work

        args.output.mkdir(parents=True, exist_ok=True)
    folders = {"gallery": args.gallery, "probes": args.probes}
    sources = {name: open_source_or_list(folder) for name, folder in folders.items()}
    people = [[same_name(photograph.identity) for photograph in source.photographs] for source in sources.values()]
    check_mated(*people)
    aligned = {name: args.aligned or _holds_aligned_faces(folder) for name, folder in folders.items()}
    encoder = None if all(aligned.values()) else face_encoder(args, device=args.device)
    recognizer = load_recognizer(args.model, args.encoder_root, args.providers, args.device)
    kept = None if args.output is None else args.output / "cache"
    gallery, probes = (
        embed_source(recognizer, source, None if aligned[name] else encoder, name, kept)
        for name, source in sources.items()
    )
    result = measure_identification(
        gallery.features, gallery.identities, probes.features, probes.identities, args.rank
    )
    print("\n".join(result.lines()))
    notes: dict[str, object] = {}
    for name, embedded in (("gallery", gallery), ("probes", probes)):
        for line in embedded.lines():
            print(f"  {name}: {line}")
        notes |= {f"{name}_skipped": embedded.skipped, f"{name}_without_face": embedded.without_face}
    enrolled = set(gallery.digests)
    twice = [file for file, digest in zip(probes.files, probes.digests, strict=True) if digest in enrolled]
    if twice:
        print(f"  {len(twice)} probes are photographs of the gallery, such as {twice[0]}: rates are too good")
    if args.output is not None:
        save_identification(result, recognizer.name, args.output, probes_in_gallery=twice, **notes)
        print(f"figures and curve saved to {args.output}")


def _holds_aligned_faces(folder: Path) -> bool:
    """Whether it is a cache of `uiface prepare` or a set of `uiface generate`."""
    from uiface_diffusers.data.image_folder import GENERATION

    return (folder / "prepare.json").is_file() or (folder / GENERATION).is_file()
