import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .options import any_of, boolean, boundary_word, device, none, one_of, part, path, real, timestep_pair, whole
from .shared import MODEL, Commands, add_command, add_encoder_arguments, face_encoder

MODELS_OWN = "the model's own"


# what `uiface_diffusers.models.CONDITIONS` has; a test compares
CONDITIONS = {
    "pose": "head pose: that of a cache's face, or a yaw from LOW to HIGH degrees (uniform:-60:60; with a pitch,"
    " uniform:-60:60,-20:20)",
}


class SamplingOption(NamedTuple):
    type: Callable[[str], Any]
    default: Any
    help: str


# those of the pipeline's call, `UIFacePipeline.sampling_defaults()`; a test compares
SAMPLING = {
    "num_inference_steps": SamplingOption(whole(), 50, "steps of the scheduler"),
    "guidance_scale": SamplingOption(
        any_of(real(low=0), none), MODELS_OWN, "how much to stress the identity; 1 is no guidance"
    ),
    "boundary": SamplingOption(
        any_of(boundary_word, none, whole(0)),
        "adaptive",
        "where stage two begins: by a rule such as adaptive (each sample's cross-attention), at a timestep, or none: a"
        " single stage",
    ),
    "boundary_threshold": SamplingOption(
        any_of(real(low=0), none), MODELS_OWN, "change of the attention maps below which the boundary is reached"
    ),
    "latest_boundary": SamplingOption(
        any_of(whole(0), none), MODELS_OWN, "timestep below which every sample is in stage two"
    ),
    "guide_from_boundary": SamplingOption(
        boolean, False, "true: guidance begins at a sample's boundary; false: at the latest boundary"
    ),
    "injection": SamplingOption(
        any_of(one_of("both", "self", "cross"), none),
        "both",
        "attention injected from the empty branch: self, cross, both or none",
    ),
    "injection_strength": SamplingOption(
        any_of(real(0, 1), none), MODELS_OWN, "strength of the cross-attention injection, from 0 to 1"
    ),
    "guidance_interval": SamplingOption(
        any_of(timestep_pair, none),
        None,
        "saves time, approximate: guide and inject only between these two timesteps, such as 200,1000",
    ),
    "reuse_empty_branch": SamplingOption(
        whole(), 1, "saves time, approximate: run the empty branch only in every n-th step"
    ),
}


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "generate",
        run,
        help="generate a data set of faces",
        description="Generates faces of a bank's identities. Run the same command again to continue. Processes share"
        " the work under `accelerate launch -m uiface_diffusers.cli generate ...`.",
        examples="""
            # a first look: 4 identities of the embedded checkpoint, 8 images of each
            uiface generate --output faces

            # 50 images of every identity in a bank
            uiface generate org/model --identities bank.safetensors --output data

            # part 0 of 32, with each image's identity turned by a random angle
            uiface generate org/model --identities bank.safetensors --output data \\
                --shard 0/32 --identity-perturbation 0.6 1.0

            # head poses of a cache's faces, by a model with a pose projector
            uiface generate org/model --identities bank.safetensors --output data --pose-distribution cache/photos

            # in directions in which real people's embeddings vary
            uiface generate org/model --identities bank.safetensors --output data --identity-flow runs/identity_flow
        """,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL)
    add_data_set_arguments(parser)
    add_encoder_arguments(
        parser, default=None, help="insightface model pack that measures the similarity of each image to its identity"
    )
    add_pipeline_arguments(parser)


def add_data_set_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=path, default=Path("faces"), metavar="FOLDER", help="the data set (default: %(default)s)"
    )
    parser.add_argument("--identities", type=path, metavar="BANK", help="default: the model's identities.safetensors")
    parser.add_argument(
        "--images-per-identity",
        type=whole(),
        metavar="NUMBER",
        help="default: 50; 8 if the identities are the model's own; all of a bank with an embedding per image",
    )
    parser.add_argument(
        "--max-identities",
        type=whole(),
        metavar="NUMBER",
        help="take only the first ones (default: all; 4 if the identities are the model's own)",
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="default: %(default)s")
    parser.add_argument(
        "--size", type=whole(), default=112, metavar="PIXELS", help="side of the images (default: %(default)s)"
    )
    parser.add_argument(
        "--image-format", default="png", metavar="FORMAT", help="png, jpeg or webp (default: %(default)s)"
    )
    parser.add_argument(
        "--output-format",
        default="imagefolder",
        metavar="FORMAT",
        help="imagefolder, webdataset or parquet (default: %(default)s)",
    )
    parser.add_argument("--shard", type=part, default=(0, 1), metavar="i/n", help="only part i of n, for job arrays")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the complete data set to the Hub")
    parser.add_argument(
        "--identity-perturbation",
        type=any_of(real(-1, 1), one_of("auto")),
        nargs="+",
        metavar="COSINE",
        help="turn each image's identity by a random angle, with a cosine from A to B (two numbers); auto: by less"
        " than half the way to its nearest neighbor in the bank",
    )
    parser.add_argument(
        "--identity-flow",
        metavar="FLOW",
        help="turn each image's identity in a direction that a flow of training/train_identity_flow.py has learned:"
        " folder or Hub repository (by cosines as between real faces if there is no --identity-perturbation)",
    )
    parser.add_argument(
        "--layouts",
        type=path,
        metavar="SOURCE",
        help="aligned faces: each image takes pose, light, expression and background of one; --boundary is how little"
        " of it stays",
    )
    for name, text in CONDITIONS.items():
        parser.add_argument(
            f"--{name}-distribution", metavar="CACHE|uniform:LOW:HIGH", help=f"each image draws a {text}"
        )
    parser.add_argument(
        "--min-similarity",
        type=real(-1, 1),
        metavar="COSINE",
        help="regenerate an image whose cosine to its identity is below this; needs --encoder",
    )
    parser.add_argument(
        "--max-attempts",
        type=whole(),
        default=3,
        metavar="NUMBER",
        help="attempts at an image with --min-similarity (default: %(default)s)",
    )


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size",
        type=whole(),
        metavar="NUMBER",
        help="faces per call of the pipeline (default: 16 on a CPU; 256 on a GPU for 32x32 latents)",
    )
    parser.add_argument(
        "--scheduler", metavar="CLASS", help="a scheduler of diffusers, such as DDIMScheduler (default: the model's)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the weights (default: %(default)s)",
    )
    parser.add_argument("--device", type=device, help="cpu, cuda, cuda:1, ... (default: what accelerate finds)")
    group = parser.add_argument_group("how to sample")
    for name, option in SAMPLING.items():
        # absent if not given: None is a value
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=option.type,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{option.help} (default: {str(option.default).lower()})",
        )

    group.add_argument(
        "--diversity",
        type=any_of(real(0, 1), one_of("recommended")),
        metavar="VALUE",
        help="choose boundary, latest boundary and guidance on the curve of `uiface calibrate`: from 0, most identity,"
        " to 1, most diversity; recommended: as real faces",
    )
    group.add_argument(
        "--identity-cosine",
        type=real(-1, 1),
        metavar="COSINE",
        help="the same by the mean cosine of an image to its identity",
    )


def run(args: argparse.Namespace) -> None:
    import torch
    from accelerate import PartialState

    from uiface_diffusers import generate_dataset
    from uiface_diffusers.loading import load_identity_flow, load_pipeline, model_identities, pipeline_folder

    perturbation = args.identity_perturbation
    if perturbation == ["auto"]:
        perturbation = "auto"
    elif perturbation is not None and (len(perturbation) != 2 or "auto" in perturbation):
        raise ValueError("--identity-perturbation takes two cosines, such as 0.6 1.0, or auto.")
    state = PartialState(cpu=args.device == "cpu")
    folder = pipeline_folder(args.model)
    identities = model_identities(folder, args.identities)
    pipeline = load_pipeline(folder, args.scheduler, dtype=getattr(torch, args.dtype))
    # all of a bank that was asked for, a handful of the model's own
    number = args.max_identities or (len(identities) if args.identities else 4)
    distributions = {name: getattr(args, f"{name}_distribution") for name in CONDITIONS}
    flow = None if args.identity_flow is None else load_identity_flow(args.identity_flow)
    report = generate_dataset(
        pipeline.to(args.device or state.device),
        identities.take(range(min(number, len(identities)))),
        args.output,
        images_per_identity=args.images_per_identity or identities.images or (50 if args.identities else 8),
        seed=args.seed,
        batch_size=args.batch_size,
        size=args.size,
        image_format=args.image_format,
        output_format=args.output_format,
        shard=args.shard,
        identity_perturbation=perturbation,
        identity_flow=None if flow is None else flow.to(args.device or state.device),
        min_similarity=args.min_similarity,
        encoder=None if args.encoder is None else face_encoder(args, device=args.device),
        max_attempts=args.max_attempts,
        push_to_hub=args.push_to_hub,
        layouts=args.layouts,
        distributions={name: value for name, value in distributions.items() if value is not None},
        diversity=args.diversity,
        identity_cosine=args.identity_cosine,
        **{name: value for name, value in vars(args).items() if name in SAMPLING},
    )
    print(
        f"{report.made} of {report.planned} images made here, {report.images_per_second:.2f} images/s,"
        f" {report.unet_rows_per_image:.1f} UNet rows per image"
    )
    if report.complete:
        print(f"{args.output} is complete; a first look: {args.output / 'preview.png'}")
    else:
        print("other parts are missing: the last one to finish writes metadata and preview")
