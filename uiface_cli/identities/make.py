import argparse
import sys
from typing import TYPE_CHECKING

from ..options import device, path, real, whole
from ..shared import (
    MODEL,
    OF_THE_MODEL,
    Commands,
    add_command,
    add_detector_argument,
    add_encoder_arguments,
    face_encoder,
    model_encoder,
)

if TYPE_CHECKING:
    from uiface_diffusers.faces import PhotographEncoder


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "make",
        run,
        help="make new identities, unlike each other and unlike known ones",
        description="Makes a bank of new identities: embeddings of faces of nobody in particular that the"
        " model generates; or embeddings of photographs; or random directions.",
        examples="""
            # faces of a model that was trained with buffalo_l, unlike the people in a cache
            uiface identities make org/model --number 1000 --output bank.safetensors --exclude cache/photos

            # people in photographs, as far as they are unlike each other
            uiface identities make --number 1000 --output bank.safetensors --from-images photos

            # people in aligned faces, by the encoder that the embedded checkpoint carries: no model pack is needed
            uiface identities make --number 10 --output bank.safetensors --from-images faces --aligned --encoder model

            # random directions from the distribution of known embeddings
            uiface identities make --number 1000 --output bank.safetensors --random --exclude cache/photos
        """,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL)
    parser.add_argument("--number", type=whole(), required=True, help="identities wanted")
    parser.add_argument("--output", type=path, required=True, metavar="FILE", help="the bank, .safetensors")
    parser.add_argument(
        "--exclude", type=path, nargs="+", default=[], metavar="BANK", help="banks or caches of known identities"
    )
    parser.add_argument(
        "--max-similarity",
        type=real(-1, 1),
        default=0.3,
        metavar="COSINE",
        help="the largest cosine of two identities (default: %(default)s)",
    )
    parser.add_argument(
        "--max-candidates",
        type=whole(),
        metavar="NUMBER",
        help="give up after this many faces (default: 20 times --number)",
    )
    parser.add_argument("--device", type=device, help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--seed", type=whole(0), default=0, help="default: %(default)s")
    parser.add_argument(
        "--batch-size", type=whole(), default=16, metavar="NUMBER", help="faces per call (default: %(default)s)"
    )
    parser.add_argument(
        "--num-inference-steps",
        type=whole(),
        default=50,
        metavar="NUMBER",
        help="steps of the scheduler (default: %(default)s)",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--from-images",
        type=path,
        metavar="SOURCE",
        help="take these photographs instead, or a cache of `uiface prepare` (needs the extra `train`)",
    )
    parser.add_argument("--aligned", action="store_true", help="pictures of --from-images are aligned faces already")
    instead.add_argument(
        "--random",
        action="store_true",
        help="take random directions from the distribution of --exclude instead (weaker)",
    )
    text = f"insightface model pack; `{OF_THE_MODEL}` with --from-images: what MODEL carries (default: %(default)s)"
    add_encoder_arguments(parser, help=text)
    add_detector_argument(parser)


def run(args: argparse.Namespace) -> None:
    from uiface_diffusers.files import check_no_folder

    check_no_folder(args.output)
    if args.random:
        make_random(args)
        return
    report = make_by_model(args) if args.from_images is None else take_from_images(args)
    print(f"saved to {args.output}: " + ", ".join(f"{name} {count}" for name, count in report.items()))


def make_random(args: argparse.Namespace) -> None:
    from uiface_diffusers.banks import load_bank
    from uiface_diffusers.identities import sample_identities

    if len(args.exclude) != 1:
        raise ValueError("--random draws from the distribution of one --exclude bank: name it.")
    sample_identities(load_bank(args.exclude[0]), args.number, args.max_similarity, args.seed).save(args.output)
    print(f"{args.number} identities saved to {args.output}")


def encoder_of_images(args: argparse.Namespace) -> "PhotographEncoder":
    if args.encoder != OF_THE_MODEL:
        return face_encoder(args)
    from uiface_diffusers.loading import pipeline_folder

    folder = pipeline_folder(args.model)
    encoder = model_encoder(args, folder)
    if encoder is None:
        raise ValueError(
            f"--encoder {OF_THE_MODEL}: {folder} carries no encoder. Name the pack that it was trained with."
        )
    if not args.aligned:
        encoder.check_detector()
    return encoder


def take_from_images(args: argparse.Namespace) -> dict[str, int]:
    from uiface_diffusers.banks import identities_from_images, is_cache, load_bank

    bank, report = identities_from_images(
        args.from_images,
        args.output,
        args.number,
        exclude=[load_bank(bank) for bank in args.exclude],
        encoder=None if is_cache(args.from_images) else encoder_of_images(args),
        max_similarity=args.max_similarity,
        aligned=args.aligned,
    )
    if len(bank) < args.number:
        print(f"only {len(bank)} of {args.number} identities were found", file=sys.stderr)
    return report


def make_by_model(args: argparse.Namespace) -> dict[str, int]:
    import torch

    from uiface_diffusers.banks import load_bank
    from uiface_diffusers.generation import make_identities
    from uiface_diffusers.loading import load_pipeline, pipeline_folder

    if OF_THE_MODEL == args.encoder:
        raise ValueError(f"--encoder {OF_THE_MODEL} is for --from-images: new identities are made by the pack itself.")
    exclude = [load_bank(bank) for bank in args.exclude]
    pipeline = load_pipeline(pipeline_folder(args.model))
    return make_identities(
        pipeline.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu")),
        face_encoder(args, device=args.device),
        args.number,
        args.output,
        exclude=exclude,
        max_similarity=args.max_similarity,
        max_candidates=args.max_candidates,
        seed=args.seed,
        batch_size=args.batch_size,
        num_inference_steps=args.num_inference_steps,
    )
