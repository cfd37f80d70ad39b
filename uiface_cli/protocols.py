"""`uiface verify` by templates, groups and corruptions."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from .options import path, real, whole
from .shared import face_encoder

if TYPE_CHECKING:
    from uiface_diffusers.data import Benchmark
    from uiface_diffusers.evaluation import VerificationResult
    from uiface_diffusers.faces import Recognizer


def add_protocol_arguments(verify: argparse.ArgumentParser) -> None:
    """The options of `uiface verify` for the protocols beside the ten folds."""
    protocols = verify.add_argument_group("protocols (docs/evaluation_protocols.md)")
    protocols.add_argument(
        "--templates",
        type=path,
        metavar="FOLDER",
        help="TAR at FAR 1e-3 to 1e-6 of templates instead: a folder of arcface_torch's IJB form, with meta/*.txt and"
        " loose_crop/",
    )
    protocols.add_argument(
        "--groups",
        type=path,
        metavar="FILE",
        help="also by group at one threshold: lines NAME,GROUP or FILE,GROUP of --pairs; BENCHMARK,GROUP of"
        " --benchmarks",
    )
    protocols.add_argument(
        "--group-fmr",
        type=real(0, 1),
        metavar="RATE",
        help="of all groups together (default: the threshold of highest accuracy)",
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
    from uiface_diffusers.evaluation.groups import pair_groups, read_groups

    if args.pairs is not None:
        from uiface_diffusers.data import read_pairs

        names = [pair[:2] for pair in read_pairs(args.pairs)]
    else:
        files = args.benchmarks.iterdir() if args.benchmarks.is_dir() else [args.benchmarks]
        names = [(file.stem, file.stem) for file in files]
    groups = read_groups(args.groups)
    if names:
        pair_groups(groups, names)


def verify_by_templates(args: argparse.Namespace) -> None:
    """`uiface verify MODEL --templates DIR`."""
    from uiface_diffusers.evaluation import load_recognizer
    from uiface_diffusers.evaluation.templates import TemplateFolder, verify_templates
    from uiface_diffusers.files import write_json

    others = ("benchmarks", "pairs", "images", "groups", "group_fmr", "corruptions")
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(args, name) not in (None, False)]
    if given:
        raise ValueError(f"--templates is a protocol of its own: leave out {', '.join(given)}.")
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
    folder = TemplateFolder(args.templates)
    needs_detector = not args.aligned and folder.landmarks is None
    encoder = face_encoder(args, device=args.device) if needs_detector else None
    recognizer = load_recognizer(args.model, args.encoder_root, args.providers, args.device)
    result = verify_templates(recognizer, folder, encoder)
    print("\n".join([f"{folder.name}:", *(f"  {line}" for line in result.lines())]))
    if args.output is not None:
        content = {"recognizer": recognizer.name, "benchmark": folder.name, **result.to_dict()}
        write_json(args.output / "templates.json", content)
        print(f"figures saved to {args.output / 'templates.json'}")


def measure_protocols(
    args: argparse.Namespace,
    recognizer: "Recognizer",
    benchmarks: "Sequence[Benchmark]",
    results: "dict[str, VerificationResult]",
) -> None:
    """`--groups` and `--corruptions` of `uiface verify`.

    Args:
        args: its options.
        recognizer: which was measured.
        benchmarks: on which it was measured.
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

    from uiface_diffusers.data import read_pairs
    from uiface_diffusers.evaluation.groups import measure_groups, pair_groups, read_groups
    from uiface_diffusers.files import write_json

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
    args: argparse.Namespace,
    recognizer: "Recognizer",
    benchmarks: "Sequence[Benchmark]",
    results: "dict[str, VerificationResult]",
) -> None:
    from uiface_diffusers.evaluation.corruptions import (
        CorruptionResult,
        corruption_table,
        save_corruptions,
        verify_corruptions,
    )

    measured: dict[str, CorruptionResult] = {}

    def keep(name: str, result: CorruptionResult) -> None:
        measured[name] = result
        if args.output is not None:
            save_corruptions(measured, recognizer.name, args.seed, args.output)

    for benchmark in benchmarks:
        done = partial(keep, benchmark.name)
        verify_corruptions(recognizer, benchmark, results[benchmark.name], seed=args.seed, done=done)
    print(corruption_table(measured))
