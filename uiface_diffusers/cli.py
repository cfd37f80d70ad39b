"""`uiface ...`: every command is one call of a function of this package."""

import argparse
import json
import sys
from pathlib import Path


def _add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoder", default="buffalo_l", help="insightface model pack (default: %(default)s)")
    parser.add_argument("--encoder-root", default="~/.insightface", help="folder with models/PACK")
    parser.add_argument("--providers", nargs="+", help="onnxruntime execution providers")
    parser.add_argument("--det-size", type=int, help="side of the detector's input (default: insightface's choice)")


def _prepare(args: argparse.Namespace) -> None:
    from .data import prepare_faces
    from .faces import FaceEncoder

    identities = None
    if args.identities is not None:
        # LFW's lists have a count in the first line and behind every name
        identities = [line.split("\t")[0].strip() for line in args.identities.read_text().splitlines()]
        if identities and identities[0].isdigit() and not (args.source / identities[0]).exists():
            del identities[0]
        identities = [name for name in identities if name]
    report = prepare_faces(
        args.source,
        args.output,
        FaceEncoder(args.encoder, args.encoder_root, args.providers, args.det_size),
        image_size=args.image_size,
        face=args.face,
        aligned=args.aligned,
        identities=identities,
        min_images=args.min_images,
        outlier_threshold=args.outlier_threshold,
        drop_outliers=args.drop_outliers,
    )
    print(f"{report['faces']} faces of {report['identities']} identities from {report['photographs']} photographs")
    for reason, count in report["reasons"].items():
        print(f"  skipped {count}: {reason}")
    print(f"  {report['several_faces']} photographs have several faces: the {args.face} one was taken")
    print(f"  {len(report['duplicates'])} are duplicates (kept)")
    state = "left out" if args.drop_outliers else "kept; --drop-outliers leaves them out"
    outliers, threshold = len(report["outliers"]), args.outlier_threshold
    print(f"  {outliers} have a cosine below {threshold} to the median of their identity ({state})")
    print(f"  files by name: {args.output / 'report.json'}")


def _generate(args: argparse.Namespace) -> None:
    import torch

    from . import IdentityBank, UIFacePipeline, default_checkpoint, generate_dataset

    model = args.model or str(default_checkpoint())
    bank_file = args.identities or Path(model) / "identities.safetensors"
    if not Path(bank_file).is_file():
        raise ValueError(f"{bank_file} is missing: name a bank of identities by --identities.")
    identities = IdentityBank.load(bank_file)
    # all of a bank that was asked for, a handful of one that was not
    number = args.max_identities or (len(identities) if args.identities else 4)
    identities = IdentityBank(identities.embeddings[:number], identities.identity_encoder, identities.names[:number])
    pipeline = UIFacePipeline.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
    made = generate_dataset(
        pipeline,
        identities,
        args.output,
        images_per_identity=args.images_per_identity,
        seed=args.seed,
        batch_size=args.batch_size,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
    )
    print(f"{made} faces of {len(identities)} identities made; a first look: {args.output / 'grid.png'}")


def _convert_original(args: argparse.Namespace) -> None:
    from .convert_original import convert_original

    config = None if args.model_config is None else json.loads(args.model_config.read_text())
    convert_original(
        args.unet,
        args.output,
        vq_encoder=args.vq_encoder,
        vq_decoder=args.vq_decoder,
        vq_model=args.vq_model,
        model_config=config,
        sample_size=args.sample_size,
        identity_encoder=args.identity_encoder,
    )
    print(f"pipeline saved to {args.output}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="uiface", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    prepare = commands.add_parser(
        "prepare",
        help="align and embed photographs, once",
        description="Photographs -> cache of aligned, embedded faces. Run it again to go on. SOURCE is a folder"
        " ROOT/IDENTITY/*.jpg, InsightFace's RecordIO (train.rec and train.idx), or webdataset shards (*.tar).",
        epilog="example: uiface prepare photos --output cache/photos --encoder buffalo_l",
    )
    prepare.add_argument("source", type=Path, help="folder, train.rec or tar shards")
    prepare.add_argument("--output", type=Path, required=True, help="the cache's folder")
    _add_encoder_arguments(prepare)
    prepare.add_argument("--image-size", type=int, default=128, help="side of the stored faces (default: %(default)s)")
    prepare.add_argument("--face", choices=("largest", "central"), default="largest", help="which of several faces")
    prepare.add_argument("--aligned", action="store_true", help="the pictures are aligned faces already: no detection")
    prepare.add_argument("--identities", type=Path, help="file with the identities to take, a name a line")
    prepare.add_argument("--min-images", type=int, default=1, help="leave out identities with fewer photographs")
    prepare.add_argument(
        "--outlier-threshold",
        type=float,
        default=0.2,
        help="least cosine of a face to the median of its identity's embeddings (default: %(default)s)",
    )
    prepare.add_argument("--drop-outliers", action="store_true", help="leave outliers out")
    prepare.set_defaults(run=_prepare)

    generate = commands.add_parser(
        "generate",
        help="make faces",
        description="Faces of a bank of identities: OUTPUT/IDENTITY/NNNN.png and a preview, OUTPUT/grid.png.",
        epilog="example: uiface generate --output faces",
    )
    generate.add_argument("model", nargs="?", help="pipeline: folder or Hub repository (default: the embedded one)")
    generate.add_argument("--output", type=Path, default=Path("faces"), help="folder (default: %(default)s)")
    generate.add_argument("--identities", type=Path, help="bank (default: identities.safetensors of the model)")
    generate.add_argument("--images-per-identity", type=int, default=8, help="default: %(default)s")
    generate.add_argument("--max-identities", type=int, help="default: all of --identities; 4 of the model's own")
    generate.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    generate.add_argument("--batch-size", type=int, default=16, help="faces a call (default: %(default)s)")
    generate.add_argument("--num-inference-steps", type=int, default=50, help="default: %(default)s")
    generate.add_argument("--guidance-scale", type=float, default=2.0, help="default: %(default)s")
    generate.set_defaults(run=_generate)

    convert = commands.add_parser(
        "convert-original",
        help="the published UIFace weights -> a pipeline folder",
        description="The published checkpoint, and CompVis' VQ-f4 first stage or a diffusers VQModel -> a pipeline.",
    )
    convert.add_argument("--unet", type=Path, required=True, help="the denoiser's file")
    convert.add_argument("--vq-encoder", type=Path, help="first stage: file with encoder and quant_conv")
    convert.add_argument("--vq-decoder", type=Path, help="first stage: file with decoder and quantisation")
    convert.add_argument("--vq-model", help="first stage: a diffusers VQModel instead of the two files")
    convert.add_argument(
        "--model-config", type=Path, help="JSON of the reference's options, if not the published ones"
    )
    convert.add_argument("--sample-size", type=int, default=32, help="of the latents (default: %(default)s)")
    convert.add_argument("--identity-encoder", help="name of the recogniser of the embeddings, as elasticface")
    convert.add_argument("--output", type=Path, required=True, help="the pipeline's folder")
    convert.set_defaults(run=_convert_original)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    try:
        args.run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"uiface {args.command}: {error}")


if __name__ == "__main__":
    main()
