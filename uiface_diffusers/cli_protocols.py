"""Commands of the evaluation protocols: `uiface identify`, `uiface poses`, and `uiface verify` by templates, groups
and corruptions."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import any_of, device, none, path, real, whole

if TYPE_CHECKING:
    from .evaluation.recognizers import Recognizer
    from .evaluation.verification import VerificationResult
    from .faces import FaceEncoder


def add_protocol_arguments(verify: argparse.ArgumentParser) -> None:
    """The options of `uiface verify` for the protocols beside the ten folds."""
    protocols = verify.add_argument_group("protocols (docs/evaluation_protocols.md)")
    protocols.add_argument(
        "--templates",
        type=path,
        help="TAR at FAR 1e-3 to 1e-6 of templates instead: a folder of arcface_torch's IJB form, with meta/*.txt and"
        " loose_crop/",
    )
    protocols.add_argument(
        "--groups",
        type=path,
        help="also by group at one threshold: lines NAME,GROUP or FILE,GROUP of --pairs; BENCHMARK,GROUP of"
        " --benchmarks",
    )
    protocols.add_argument(
        "--group-fmr", type=real(0, 1), help="of all groups together (default: the threshold of highest accuracy)"
    )
    protocols.add_argument(
        "--corruptions", action="store_true", help="also on corrupted faces: five kinds, five strengths each"
    )
    protocols.add_argument("--seed", type=whole(0), default=0, help="of the corruptions (default: %(default)s)")


def check_protocols(args: argparse.Namespace) -> None:
    """Reads the groups of `uiface verify`, before the work.

    Raises:
        ValueError: their file is damaged or of other people, or `--group-fmr` is given without it.
    """
    if args.groups is None:
        if args.group_fmr is not None:
            raise ValueError("--group-fmr needs --groups.")
        return
    from .evaluation.groups import pair_groups, read_groups

    if args.pairs is not None:
        from .data import read_pairs

        names = [pair[:2] for pair in read_pairs(args.pairs)]
    else:
        files = args.benchmarks.glob("*.bin") if args.benchmarks.is_dir() else [args.benchmarks]
        names = [(file.stem, file.stem) for file in files]
    if names:
        pair_groups(read_groups(args.groups), names)


def _face_encoder(args: argparse.Namespace, aligned: bool) -> "FaceEncoder | None":
    """What aligns the faces; none of aligned ones."""
    if aligned:
        return None
    from .faces import FaceEncoder

    return FaceEncoder(args.encoder, args.encoder_root, args.providers, args.det_size, device=args.device)


def verify_by_templates(args: argparse.Namespace) -> None:
    """`uiface verify MODEL --templates DIR`."""
    from .evaluation import load_recognizer
    from .evaluation.templates import TemplateFolder, verify_templates
    from .files import write_json

    others = ("benchmarks", "pairs", "images", "groups", "group_fmr", "corruptions")
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(args, name) not in (None, False)]
    if given:
        raise ValueError(f"--templates is a protocol of its own: leave out {', '.join(given)}.")
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
    folder = TemplateFolder(args.templates)
    encoder = _face_encoder(args, args.aligned or folder.landmarks is not None)
    recognizer = load_recognizer(args.model, args.encoder_root, args.providers, args.device)
    result = verify_templates(recognizer, folder, encoder)
    print("\n".join([f"{folder.name}:", *(f"  {line}" for line in result.lines())]))
    if args.output is not None:
        content = {"recognizer": recognizer.name, "benchmark": folder.name, **result.to_dict()}
        write_json(args.output / "templates.json", content)
        print(f"figures saved to {args.output / 'templates.json'}")


def measure_protocols(
    args: argparse.Namespace, recognizer: "Recognizer", benchmarks: Path, results: "dict[str, VerificationResult]"
) -> None:
    """`--groups` and `--corruptions` of `uiface verify`.

    Args:
        args: its options.
        recognizer: which was measured.
        benchmarks: a folder of `.bin` files, or one.
        results: of these benchmarks as they are.
    """
    if args.groups is not None:
        _measure_groups(args, recognizer, results)
    if args.corruptions:
        _measure_corruptions(args, recognizer, benchmarks, results)


def _measure_groups(
    args: argparse.Namespace, recognizer: "Recognizer", results: "dict[str, VerificationResult]"
) -> None:
    import numpy as np

    from .data import read_pairs
    from .evaluation.groups import measure_groups, pair_groups, read_groups
    from .files import write_json

    # genuine pairs before impostor ones, as the results have them
    names: list[tuple[str, str]] = []
    if args.pairs is not None:
        names = [(pair.first, pair.second) for pair in sorted(read_pairs(args.pairs), key=lambda pair: not pair.same)]
    scores, same = [], []
    for name, result in results.items():
        scores += [result.genuine, result.impostor]
        same += [np.ones(len(result.genuine), bool), np.zeros(len(result.impostor), bool)]
        if args.pairs is None:
            names += [(name, name)] * (len(result.genuine) + len(result.impostor))
    groups, across, unknown = pair_groups(read_groups(args.groups), names)
    measured = measure_groups(np.concatenate(scores), np.concatenate(same), groups, args.group_fmr)
    measured.across, measured.unknown = across, unknown
    print("\n".join(measured.lines()))
    if args.output is not None:
        write_json(args.output / "groups.json", {"recognizer": recognizer.name, **measured.to_dict()})


def _measure_corruptions(
    args: argparse.Namespace, recognizer: "Recognizer", benchmarks: Path, results: "dict[str, VerificationResult]"
) -> None:
    from .evaluation.corruptions import CorruptionResult, corruption_table, save_corruptions, verify_corruptions
    from .evaluation.verification import read_benchmarks

    measured: dict[str, CorruptionResult] = {}

    def keep(name: str, result: CorruptionResult) -> None:
        measured[name] = result
        if args.output is not None:
            save_corruptions(measured, recognizer.name, args.seed, args.output)

    for benchmark in read_benchmarks(benchmarks):
        done = partial(keep, benchmark.name)
        verify_corruptions(recognizer, benchmark, results[benchmark.name], seed=args.seed, done=done)
    print(corruption_table(measured))


def add_identify(commands: Any, add_encoder_arguments: Callable[..., None]) -> None:
    """`uiface identify`.

    Args:
        commands: argparse's subparsers.
        add_encoder_arguments: adds `--encoder`, `--encoder-root`, `--providers` and `--det-size` to a parser.
    """
    identify = commands.add_parser(
        "identify",
        help="measure a recognizer by open-set search in a gallery",
        description="TPIR at FPIR 1 and 0.1 %%, rank-k and the DET curve. GALLERY and PROBES are in any form of"
        " `uiface prepare`, or lists of FILE,IDENTITY (.txt, .csv, .tsv). Probes of identities that are not in the"
        " gallery are the non-mated ones.",
        epilog="example: uiface identify buffalo_l --gallery gallery --probes probes --output results",
    )
    identify.add_argument("model", help="insightface model pack; or a recognizer's folder or Hub repository ORG/NAME")
    identify.add_argument("--gallery", type=path, required=True, help="photographs of the enrolled people")
    identify.add_argument("--probes", type=path, required=True, help="other photographs, to search for")
    identify.add_argument("--aligned", action="store_true", help="they are aligned faces already: no detection")
    identify.add_argument(
        "--rank",
        type=any_of(whole(), none),
        default=1,
        help="a mate counts as found up to this rank; none: at any (default: %(default)s)",
    )
    identify.add_argument("--output", type=path, help="folder for identification.json and det.png")
    identify.add_argument("--device", type=device, help="of a model that is no pack (default: a GPU if there is one)")
    add_encoder_arguments(identify, role="insightface model pack whose detector aligns the photographs")
    identify.set_defaults(run=_identify)


def _identify(args: argparse.Namespace) -> None:
    from .data.file_list import open_source_or_list
    from .evaluation import load_recognizer
    from .evaluation.embedding import embed_source
    from .evaluation.identification import check_mated, measure_identification, save_identification
    from .files import same_name

    if args.output is not None:
        import matplotlib  # noqa: F401  what is not installed is named before the work

        args.output.mkdir(parents=True, exist_ok=True)
    folders = {"gallery": args.gallery, "probes": args.probes}
    sources = {name: open_source_or_list(folder) for name, folder in folders.items()}
    people = [[same_name(photograph.identity) for photograph in source.photographs] for source in sources.values()]
    check_mated(*people)
    aligned = {name: args.aligned or _holds_aligned_faces(folder) for name, folder in folders.items()}
    encoder = _face_encoder(args, all(aligned.values()))
    recognizer = load_recognizer(args.model, args.encoder_root, args.providers, args.device)
    gallery, probes = (
        embed_source(recognizer, source, None if aligned[name] else encoder, name) for name, source in sources.items()
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
    from .data.image_folder import GENERATION

    return (folder / "prepare.json").is_file() or (folder / GENERATION).is_file()


def add_poses(commands: Any) -> None:
    """`uiface poses`.

    Args:
        commands: argparse's subparsers.
    """
    poses = commands.add_parser(
        "poses",
        help="head poses of a cache's faces, by group",
        description="Yaw and pitch of the faces of a cache of `uiface prepare`, from their landmarks.",
        epilog="example: uiface poses cache/photos --groups groups.csv",
    )
    poses.add_argument("cache", type=path, help="folder of `uiface prepare`")
    poses.add_argument("--groups", type=path, help="lines NAME,GROUP or FILE,GROUP")
    poses.add_argument("--output", type=path, help="the figures, .json")
    poses.set_defaults(run=_poses)


def _poses(args: argparse.Namespace) -> None:
    from .data import FaceCache
    from .evaluation.groups import pose_lines, pose_statistics, read_groups
    from .files import check_no_folder, write_json

    if args.output is not None:
        check_no_folder(args.output)
    groups = None if args.groups is None else read_groups(args.groups)
    statistics = pose_statistics(FaceCache(args.cache), groups)
    print("\n".join(pose_lines(statistics)))
    if args.output is not None:
        write_json(args.output, statistics)
        print(f"figures saved to {args.output}")
