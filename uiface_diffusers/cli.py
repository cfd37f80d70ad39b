"""`uiface ...`: every command is one call of a function of this package."""

import argparse
import ast
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

from .files import paragraph
from .options import (
    any_of,
    boolean,
    device,
    expand_home,
    none,
    one_of,
    part,
    path,
    provider,
    real,
    timestep_pair,
    whole,
)


def _add_encoder_arguments(
    parser: argparse.ArgumentParser, default: str | None = "buffalo_l", role: str = "insightface model pack"
) -> None:
    parser.add_argument("--encoder", default=default, help=f"{role} (default: %(default)s)")
    parser.add_argument("--encoder-root", default="~/.insightface", help="folder with models/PACK")
    parser.add_argument(
        "--providers", nargs="+", type=provider, help="onnxruntime execution providers: cuda, cpu, tensorrt, ..."
    )
    parser.add_argument(
        "--det-size",
        type=whole(32, multiple_of=32),
        help="side of the detector's input, a multiple of 32 (default: insightface's choice)",
    )


def _face_encoder(args: argparse.Namespace, **options):
    """The encoder of `_add_encoder_arguments`."""
    from .faces import FaceEncoder

    return FaceEncoder(args.encoder, args.encoder_root, args.providers, args.det_size, **options)


def _prepare(args: argparse.Namespace) -> None:
    from .data import prepare_faces
    from .data.sources import describe_left_out
    from .faces import SIDE_VIEW
    from .files import read_lines

    identities = None
    if args.identities is not None:
        # LFW's lists have their length in the first line, and a tab and a count behind every name
        lines = [line for line in read_lines(args.identities) if line.strip()]
        has_length = any("\t" in line for line in lines) and "\t" not in lines[0]
        identities = [line.split("\t")[0].strip() for line in lines[has_length:]]
        if not identities:
            raise ValueError(f"{args.identities} names no identities.")
    report = prepare_faces(
        args.source,
        args.output,
        _face_encoder(args, threads=1 if args.threads > 1 else None),
        image_size=args.image_size,
        face=args.face,
        aligned=args.aligned,
        identities=identities,
        min_images=args.min_images,
        outlier_threshold=args.outlier_threshold,
        drop_outliers=args.drop_outliers,
        min_in_frame=args.min_in_frame,
        threads=args.threads,
    )
    print(f"{report['faces']} faces of {report['identities']} identities from {report['photographs']} photographs")
    for reason, count in report["reasons"].items():
        print(f"  skipped {count}: {reason}")
    if report["poses_known"]:
        print(f"  {report['side_views']} of {report['poses_known']} look sideways (|yaw| > {SIDE_VIEW})")
        below = ", ".join(f"{share}: {count}" for share, count in report["in_frame_below"].items())
        print(f"  faces by the share of the aligned picture within the photograph, below {below}")
    else:
        print("  head poses are not known: kept for photographs in which this version detected the face")
    print(f"  {len(report['several_faces'])} photographs have several faces: the {args.face} one was taken")
    print(f"  {len(report['duplicates'])} are duplicates (kept)")
    state = "left out" if args.drop_outliers else "kept; --drop-outliers leaves them out"
    outliers, threshold = len(report["outliers"]), args.outlier_threshold
    print(f"  {outliers} have a cosine below {threshold} to the median of their identity ({state})")
    for line in describe_left_out(report["left_out"]):
        print(f"  left out {line}")
    print(f"  files by name: {args.output / 'report.json'}")


def _convert(args: argparse.Namespace) -> None:
    from .data import convert_dataset
    from .data.sources import describe_left_out

    report = convert_dataset(args.source, args.output, args.format, args.nested)
    print(f"{report['photographs']} pictures of {report['identities']} identities written to {args.output}")
    for line in describe_left_out(report["left_out"]):
        print(f"  left out {line}")


# of the pipeline's call
SAMPLING_TYPES = {
    "num_inference_steps": whole(),
    "guidance_scale": any_of(real(low=0), none),
    "boundary": any_of(one_of("adaptive"), none, whole(0)),
    "boundary_threshold": any_of(real(low=0), none),
    "latest_boundary": any_of(whole(0), none),
    "guide_from_boundary": boolean,
    "injection": any_of(one_of("both", "self", "cross"), none),
    "injection_strength": any_of(real(0, 1), none),
    "guidance_interval": any_of(timestep_pair, none),
    "reuse_empty_branch": whole(),
}


def _sampling_value(text: str):
    """A word of the command line as Python's number, None, True or False; any other word is itself."""
    try:
        return ast.literal_eval(text.capitalize() if text.lower() in ("none", "true", "false") else text)
    except (ValueError, SyntaxError):
        return text


def _pipeline_folder(model: str | None) -> Path:
    """Of a folder, a Hub repository, or the embedded checkpoint."""
    from . import UIFacePipeline, default_checkpoint

    model = model or str(default_checkpoint())
    return Path(model) if Path(model).is_dir() else Path(UIFacePipeline.download(model))


def _load_pipeline(folder: Path, **options):
    """The pipeline of a folder; what is damaged is named."""
    from . import UIFacePipeline
    from .files import brief, check_safetensors

    try:
        return UIFacePipeline.from_pretrained(folder, **options)
    except OSError:
        check_safetensors(folder)
        raise
    except (AttributeError, ImportError, IndexError, KeyError, RuntimeError, TypeError) as error:
        reason = f"{type(error).__name__}: {brief(error)}"
        raise ValueError(f"{folder} holds no pipeline, or a file of it is damaged ({reason}).") from error


def _generate(args: argparse.Namespace) -> None:
    import diffusers
    import torch
    from accelerate import PartialState

    from . import IdentityBank, generate_dataset
    from .hub import IDENTITIES
    from .two_stage.schedulers import scheduler_like

    state = PartialState(cpu=args.device == "cpu")
    folder = _pipeline_folder(args.model)
    bank_file = args.identities or folder / IDENTITIES
    if not bank_file.is_file():
        raise ValueError(f"{bank_file} is missing: name a bank of identities by --identities.")
    identities = IdentityBank.load(bank_file)
    pipeline = _load_pipeline(folder, dtype=getattr(torch, args.dtype))
    sampling = {name: getattr(args, name) for name in pipeline.sampling_defaults() if hasattr(args, name)}
    if args.scheduler is not None:
        scheduler = getattr(diffusers, args.scheduler, None)
        if not hasattr(scheduler, "from_config") or "Scheduler" not in args.scheduler:
            raise ValueError(f"--scheduler {args.scheduler} is no scheduler of diffusers, as DDIMScheduler is one.")
        pipeline.scheduler = scheduler_like(scheduler, pipeline.scheduler)
    # all of a bank that was asked for, a handful of one that was not
    number, images = args.max_identities, args.images_per_identity
    number = (len(identities) if args.identities else 4) if number is None else number
    images = (50 if args.identities else 8) if images is None else images
    encoder = None
    if args.encoder is not None:
        encoder = _face_encoder(args, device=args.device)
    report = generate_dataset(
        pipeline.to(args.device or state.device),
        identities.take(range(min(number, len(identities)))),
        args.output,
        images_per_identity=images,
        seed=args.seed,
        batch_size=args.batch_size,
        size=args.size,
        image_format=args.image_format,
        output_format=args.output_format,
        shard=args.shard,
        identity_perturbation=args.identity_perturbation,
        min_similarity=args.min_similarity,
        encoder=encoder,
        max_attempts=args.max_attempts,
        push_to_hub=args.push_to_hub,
        **sampling,
    )
    print(
        f"{report.made} of {report.planned} images made here, {report.images_per_second:.2f} images/s,"
        f" {report.unet_rows_per_image:.1f} UNet rows per image"
    )
    if report.complete:
        print(f"{args.output} is complete; a first look: {args.output / 'preview.png'}")
    else:
        print("other parts are missing: the last one to finish writes metadata and preview")


def _add_generate(commands) -> None:
    generate = commands.add_parser(
        "generate",
        help="make a data set",
        description="Faces of a bank of identities. Run it again to go on; under `accelerate launch -m"
        " uiface_diffusers.cli generate ...` processes share the work.",
        epilog="example: uiface generate --output faces",
    )
    generate.add_argument("model", nargs="?", help="pipeline: folder or Hub repository (default: the embedded one)")
    generate.add_argument("--output", type=path, default=Path("faces"), help="folder (default: %(default)s)")
    generate.add_argument("--identities", type=path, help="bank (default: identities.safetensors of the model)")
    generate.add_argument("--images-per-identity", type=whole(), help="default: 50; 8 of the model's own identities")
    generate.add_argument("--max-identities", type=whole(), help="default: all of --identities; 4 of the model's own")
    generate.add_argument("--seed", type=whole(0), default=0, help="default: %(default)s")
    generate.add_argument(
        "--batch-size", type=whole(), help="faces per call (default: 16 on a CPU; on a GPU 256 of 32x32 latents)"
    )
    generate.add_argument("--size", type=whole(), default=112, help="side of the images (default: %(default)s)")
    generate.add_argument("--image-format", default="png", help="png, jpeg or webp (default: %(default)s)")
    generate.add_argument("--output-format", default="imagefolder", help="imagefolder (default) or webdataset")
    generate.add_argument("--shard", type=part, default=(0, 1), metavar="i/n", help="part i of n, for job arrays")
    generate.add_argument(
        "--identity-perturbation", type=real(-1, 1), nargs=2, metavar=("A", "B"), help="cosine from A to B"
    )
    generate.add_argument(
        "--min-similarity", type=real(-1, 1), help="make an image anew below this cosine; needs --encoder"
    )
    generate.add_argument("--max-attempts", type=whole(), default=3, help="at an image (default: %(default)s)")
    _add_encoder_arguments(generate, default=None)
    generate.add_argument("--scheduler", help="a scheduler of diffusers (default: the model's)")
    generate.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    generate.add_argument("--device", type=device, help="default: what accelerate finds")
    generate.add_argument("--push-to-hub", metavar="REPO", help="upload the complete data set")
    from .pipeline_uiface import MODEL_DEFAULTS, UIFacePipeline

    group = generate.add_argument_group("sampling: arguments of the pipeline's call")
    for name, value in UIFacePipeline.sampling_defaults().items():
        option = f"--{name.replace('_', '-')}"
        default = "the model's" if name in MODEL_DEFAULTS else value
        # absent if not given: None is a value
        group.add_argument(
            option,
            type=SAMPLING_TYPES.get(name, _sampling_value),
            dest=name,
            default=argparse.SUPPRESS,
            help=f"default: {default}",
        )
    generate.set_defaults(run=_generate)


def _audit(args: argparse.Namespace) -> None:
    from .data import FaceCache
    from .evaluation.leakage import audit_dataset

    audit_dataset(
        args.dataset,
        _face_encoder(args),
        _load_bank(args.against),
        FaceCache(args.against) if args.against.is_dir() else None,
        args.plot,
        args.worst,
        log=print,
    )


def _load_bank(path: Path):
    """A bank's file, or the embeddings of a cache of `uiface prepare`."""
    from . import IdentityBank
    from .data import FaceCache

    return FaceCache(path).embeddings() if path.is_dir() else IdentityBank.load(path)


def _make_identities(args: argparse.Namespace) -> None:
    import torch

    from .data import FaceCache, FaceCacheSource, prepare_faces
    from .files import check_no_folder
    from .identities import keep_distinct, make_identities, sample_identities

    check_no_folder(args.output)
    exclude = [_load_bank(path) for path in args.exclude]
    if args.random:
        if len(exclude) != 1:
            raise ValueError("--random draws from the distribution of one --exclude bank: name it.")
        sample_identities(exclude[0], args.number, args.max_similarity, args.seed).save(args.output)
        print(f"{args.number} identities saved to {args.output}")
        return
    if args.from_images is not None:
        is_cache = (args.from_images / "prepare.json").is_file()
        cache = args.from_images if is_cache else Path(f"{args.output}.faces")
        if not is_cache:
            prepare_faces(args.from_images, cache, _face_encoder(args), aligned=args.aligned)
        candidates = FaceCache(cache).embeddings()
        # names that can be folders
        candidates.names = [re.sub(r"[/:\\]", "_", photo.file) for photo in FaceCacheSource(cache).photographs]
        bank, report = keep_distinct(candidates, exclude, args.max_similarity, args.number)
        bank.save(args.output)
        if not is_cache:
            shutil.rmtree(cache)
        if len(bank) < args.number:
            print(f"only {len(bank)} of {args.number} identities were found", file=sys.stderr)
    else:
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        pipeline = _load_pipeline(_pipeline_folder(args.model)).to(device)
        report = make_identities(
            pipeline,
            _face_encoder(args, device=args.device),
            args.number,
            args.output,
            exclude=exclude,
            max_similarity=args.max_similarity,
            max_candidates=args.max_candidates,
            seed=args.seed,
            batch_size=args.batch_size,
            num_inference_steps=args.num_inference_steps,
        )
    print(f"saved to {args.output}: " + ", ".join(f"{name} {count}" for name, count in report.items()))


def _import_identities(args: argparse.Namespace) -> None:
    from .identities import import_identities

    bank, report = import_identities(args.file, args.encoder, args.key)
    bank.save(args.output)
    print(f"{report['identities']} identities of `{args.encoder}`, {report['dimension']}-d, saved to {args.output}")
    print(f"  {report['not of unit length']} were not of unit length: normalized")
    duplicates = list(report["duplicates"].items())
    print(f"  {len(duplicates)} are duplicates (kept)")
    for name, first in duplicates[:10]:
        print(f"    {name} of {first}")


def _perturb_identities(args: argparse.Namespace) -> None:
    from dataclasses import replace

    import torch.nn.functional as F

    from .identities import perturb_embeddings
    from .seeds import PERTURBATION, image_generator

    bank = _load_bank(args.bank)
    generators = [image_generator(args.seed, name, 0, stream=PERTURBATION) for name in bank.names]
    embeddings, cosines = perturb_embeddings(F.normalize(bank.embeddings), tuple(args.cosine), generators)
    replace(bank, embeddings=embeddings).save(args.output)
    print(f"{len(bank)} identities saved to {args.output}, mean cosine to the given ones {cosines.mean():.3f}")


def _inspect_identities(args: argparse.Namespace) -> None:
    from .identities import inspect_bank, text_histogram

    bank = _load_bank(args.bank)
    known = None if args.against is None else _load_bank(args.against)
    report = inspect_bank(bank, known)
    print(f"{len(bank)} identities of `{bank.identity_encoder}`, {bank.embeddings.shape[1]}-d")
    histograms = {"nearest other identity": report.nearest_other}
    if known is not None:
        histograms[f"nearest of {args.against}"] = report.nearest_known
    for title, values in histograms.items():
        print(f"cosine to the {title}: mean {values.mean():.3f}, largest {values.max():.3f}")
        print("\n".join("  " + line for line in text_histogram(values)))
    for first, second, cosine in report.duplicates:
        print(f"duplicate: {first} and {second}, {cosine:.4f}")
    if known is not None:
        position = int(report.nearest_known.argmax())
        print(f"nearest: {bank.names[position]} to {report.known_names[position]}, {report.nearest_known.max():.4f}")
    if args.plot is not None:
        from .evaluation.plots import plot_histograms

        plot_histograms({title: values.numpy() for title, values in histograms.items()}, "cosine").savefig(args.plot)
        print(f"histogram saved to {args.plot}")


def _add_identities(commands) -> None:
    identities = commands.add_parser("identities", help="make, import, perturb and inspect banks of identities")
    actions = identities.add_subparsers(dest="action", required=True)

    make = actions.add_parser(
        "make",
        help="new identities, unlike each other and unlike known ones",
        description="New identities: embeddings of faces that the model makes of nobody in particular; or of images,"
        " or random directions.",
    )
    make.add_argument("model", nargs="?", help="pipeline: folder or Hub repository (default: the embedded one)")
    make.add_argument("--number", type=whole(), required=True, help="identities wanted")
    make.add_argument("--output", type=path, required=True, help="the bank, .safetensors")
    make.add_argument("--exclude", type=path, nargs="+", default=[], help="banks or caches of known identities")
    make.add_argument("--max-similarity", type=real(-1, 1), default=0.3, help="largest cosine (default: %(default)s)")
    make.add_argument("--max-candidates", type=whole(), help="give up after so many (default: 20 times --number)")
    make.add_argument("--device", type=device, help="default: a GPU if there is one")
    make.add_argument("--seed", type=whole(0), default=0, help="default: %(default)s")
    make.add_argument("--batch-size", type=whole(), default=16, help="faces per call (default: %(default)s)")
    make.add_argument("--num-inference-steps", type=whole(), default=50, help="default: %(default)s")
    instead = make.add_mutually_exclusive_group()
    instead.add_argument(
        "--from-images",
        type=path,
        help="take these photographs instead, or a cache of `uiface prepare` (needs the extra `train`)",
    )
    make.add_argument("--aligned", action="store_true", help="they are aligned faces: no detection")
    instead.add_argument(
        "--random", action="store_true", help="directions from the distribution of --exclude (weaker)"
    )
    _add_encoder_arguments(make)
    make.set_defaults(run=_make_identities)

    imported = actions.add_parser(
        "import",
        help="a bank of published embeddings",
        description="Embeddings in .npy, .npz, .pt (of nothing but tensors) or .safetensors, one identity per row -> a"
        " bank. Nothing in the file is executed.",
        epilog="example: uiface identities import identities.npy --encoder elasticface --output bank.safetensors",
    )
    imported.add_argument("file", type=path, help="(N, identity_dim) floating point numbers")
    imported.add_argument("--encoder", required=True, help="name of the recognizer that made them")
    imported.add_argument("--key", help="which array, of a file with several")
    imported.add_argument("--output", type=path, required=True, help="the bank, .safetensors")
    imported.set_defaults(run=_import_identities)

    perturb = actions.add_parser("perturb", help="turn every identity by a random angle (IDperturb)")
    perturb.add_argument("bank", type=path)
    perturb.add_argument("--cosine", type=real(-1, 1), nargs=2, default=(0.6, 1.0), metavar=("A", "B"))
    perturb.add_argument("--seed", type=whole(0), default=0)
    perturb.add_argument("--output", type=path, required=True)
    perturb.set_defaults(run=_perturb_identities)

    inspect_parser = actions.add_parser("inspect", help="similarities, duplicates, the nearest known identity")
    inspect_parser.add_argument("bank", type=path, help="a bank, or a cache of `uiface prepare`")
    inspect_parser.add_argument("--against", type=path, help="bank or cache of known identities")
    inspect_parser.add_argument("--plot", type=path, help="save the histogram as a picture")
    inspect_parser.set_defaults(run=_inspect_identities)


def _add_audit(commands) -> None:
    audit = commands.add_parser(
        "audit",
        help="does a data set show people of the training?",
        description="Cosine of every image and identity of a generated data set to the nearest real embedding, and the"
        " share above thresholds measured on real impostors.",
    )
    audit.add_argument("dataset", type=path, help="a folder of `uiface generate`, or of identities")
    audit.add_argument("--against", type=path, required=True, help="cache of `uiface prepare`, or a bank")
    audit.add_argument("--worst", type=whole(0), default=8, help="pairs to show (default: %(default)s)")
    audit.add_argument("--plot", type=path, default=Path("audit.png"), help="their picture (default: %(default)s)")
    _add_encoder_arguments(audit)
    audit.set_defaults(run=_audit)


def _make_benchmark(args: argparse.Namespace) -> None:
    from .data import make_benchmark

    report = make_benchmark(args.pairs, args.images, args.output, None if args.aligned else _face_encoder(args))
    print(f"{report['pairs']} pairs of {report['photographs']} photographs saved to {args.output}")
    if not args.aligned:
        print(f"  {report['several_faces']} photographs have several faces: the central one was taken")
        print(f"  {len(report['without_face'])} show none: the square about their center was taken")
    for name in report["without_face"]:
        print(f"    {name}")


def _verify(args: argparse.Namespace) -> None:
    from .data import make_benchmark, read_pairs
    from .data.pairs import check_pairs
    from .evaluation import load_recognizer, save_verification, verification_table, verify_benchmarks

    if (args.benchmarks is None) == (args.pairs is None) or (args.pairs is None) != (args.images is None):
        raise ValueError("give either --benchmarks, or --pairs with --images.")
    if args.output is not None:
        import matplotlib  # noqa: F401  what is not installed is named before the work

        args.output.mkdir(parents=True, exist_ok=True)

    if args.pairs is not None:
        check_pairs(args.pairs, [pair.same for pair in read_pairs(args.pairs)])
    recognizer = load_recognizer(args.model, args.encoder_root, args.providers, args.device)

    def save(results) -> None:
        if args.output is not None:
            save_verification(results, recognizer.name, args.output)

    with tempfile.TemporaryDirectory() as folder:
        benchmarks = args.benchmarks
        if args.pairs is not None:
            benchmarks = Path(folder) / f"{args.pairs.stem}.bin"
            encoder = None if args.aligned else _face_encoder(args, device=args.device)
            make_benchmark(args.pairs, args.images, benchmarks, encoder)
        results = verify_benchmarks(recognizer, benchmarks, done=save)
    print(verification_table(results))
    if args.output is not None:
        print(f"figures and curves saved to {args.output}")


def _add_verification(commands) -> None:
    make = commands.add_parser(
        "make-benchmark",
        help="a list of pairs and photographs -> a verification benchmark",
        description="LFW's pairs.txt (or a list of its form) and a folder NAME/NAME_0001.jpg -> InsightFace's .bin, of"
        " aligned faces.",
        epilog="example: uiface make-benchmark --pairs lfw/pairs.txt --images lfw/images --output benchmarks/lfw.bin",
    )
    make.add_argument("--pairs", type=path, required=True, help="list of pairs")
    make.add_argument("--images", type=path, required=True, help="folder of NAME/NAME_0001.jpg")
    make.add_argument("--output", type=path, required=True, help="the benchmark, .bin")
    make.add_argument("--aligned", action="store_true", help="the pictures are aligned faces already: no detection")
    _add_encoder_arguments(make)
    make.set_defaults(run=_make_benchmark)

    verify = commands.add_parser(
        "verify",
        help="measure a recognizer",
        description="Verification accuracy on ten folds, equal error rate and true accept rates, with 95 % intervals.",
        epilog="example: uiface verify buffalo_l --benchmarks benchmarks --output results",
    )
    verify.add_argument("model", help="insightface model pack; or a recognizer's folder or Hub repository ORG/NAME")
    verify.add_argument("--benchmarks", type=path, help="folder of .bin files, or one")
    verify.add_argument("--pairs", type=path, help="a list of pairs of LFW's form instead, with --images")
    verify.add_argument("--images", type=path, help="folder of NAME/NAME_0001.jpg")
    verify.add_argument("--aligned", action="store_true", help="they are aligned faces already: no detection")
    verify.add_argument("--output", type=path, help="folder for verification.json and roc.png")
    verify.add_argument("--device", type=device, help="of a model that is no pack (default: a GPU if there is one)")
    _add_encoder_arguments(verify, role="insightface model pack whose detector aligns --images")
    verify.set_defaults(run=_verify)


def _convert_original(args: argparse.Namespace) -> None:
    from .convert_original import convert_original

    config = None
    if args.model_config is not None:
        try:
            config = json.loads(args.model_config.read_text())
        except ValueError as error:
            raise ValueError(f"--model-config {args.model_config} is no JSON file: {error}") from error
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


def _evaluate(args: argparse.Namespace) -> None:
    from .evaluation import TorchvisionFeatures, evaluate_dataset, load_lpips
    from .faces import FaceEncoder
    from .hub import IDENTITIES

    # a data set of `uiface generate` has the bank that it follows
    own = args.dataset / IDENTITIES
    bank = args.identities or (own if own.is_file() else None)
    features = args.features
    if features in ("vgg16", "inception_v3"):
        features = TorchvisionFeatures(features, args.feature_weights)
    pack = (args.encoder_root, args.providers, args.det_size)
    output = args.output or Path("evaluation") / args.dataset.resolve().name
    evaluate_dataset(
        args.dataset,
        output,
        _face_encoder(args),
        judge=None if args.judge is None else FaceEncoder(args.judge, *pack),
        identities=None if bank is None else _load_bank(bank),
        against=None if args.against is None else _load_bank(args.against),
        real=args.real,
        same_people=args.same_people,
        features=features,
        perceptual=load_lpips(args.lpips_network, args.lpips_backbone),
        lpips_pairs=args.lpips_pairs or None,
        neighbors=args.neighbors,
        threshold=args.threshold,
        max_pairs=args.max_pairs,
        max_images=args.max_images,
        seed=args.seed,
        device=args.device,
        skip_unusable=args.skip_unusable,
        log=print,
    )
    print(f"written to {output / 'report.html'} and report.json")


def _compare(args: argparse.Namespace) -> None:
    from .evaluation import compare_reports, load_report

    comparison = compare_reports([load_report(path) for path in args.reports])
    for line in comparison.lines():
        print(line)
    if args.output is not None:
        comparison.write(args.output)
        print(f"written to {args.output / 'comparison.html'} and comparison.json")


def _add_evaluate(commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="realism, diversity, consistency, separability and leakage of a data set",
        description="Measures a data set of aligned faces: of `uiface generate` or `uiface prepare`, identity folders,"
        " RecordIO or webdataset shards. Run it again to go on.",
        epilog="example: uiface evaluate faces --encoder buffalo_l --judge antelopev2 --real cache/photos",
    )
    evaluate.add_argument("dataset", type=path, help="folder, train.rec or tar shards")
    evaluate.add_argument("--output", type=path, help="folder of the report (default: evaluation/NAME)")
    _add_encoder_arguments(evaluate)
    evaluate.add_argument("--judge", metavar="PACK", help="second model pack, which the generator has not seen")
    evaluate.add_argument("--identities", type=path, help="bank that the faces follow (default: the data set's own)")
    evaluate.add_argument("--against", type=path, help="bank or cache of real people, to look for leakage")
    evaluate.add_argument(
        "--real",
        type=path,
        action="append",
        help="real faces, in any of the forms or a folder of pictures, for KID, the classifier test, precision and"
        " recall; again for another set, of which as many faces are taken",
    )
    evaluate.add_argument(
        "--same-people", action="store_true", help="a name is the same person in both: also by person"
    )
    evaluate.add_argument(
        "--features",
        choices=("lpips", "encoder", "vgg16", "inception_v3"),
        default="lpips",
        help="of precision and recall (default: the LPIPS backbone)",
    )
    evaluate.add_argument("--feature-weights", type=path, help="safetensors of torchvision's vgg16 or inception_v3")
    evaluate.add_argument("--neighbors", type=whole(), default=3, help="k of these (default: %(default)s)")
    evaluate.add_argument(
        "--max-images", type=whole(), default=50_000, help="of each set for these (default: %(default)s)"
    )
    evaluate.add_argument("--lpips-network", choices=("alex", "squeeze", "vgg"), default="alex")
    evaluate.add_argument("--lpips-backbone", type=path, help="its convolutions, safetensors (default: torchvision's)")
    evaluate.add_argument(
        "--lpips-pairs", type=whole(0), default=20, help="of an identity, 0: all (default: %(default)s)"
    )
    evaluate.add_argument(
        "--max-pairs", type=whole(), default=1_000_000, help="to compare faces of (default: %(default)s)"
    )
    evaluate.add_argument(
        "--threshold", type=real(-1, 1), default=0.3, help="cosine of one person (default: %(default)s)"
    )
    evaluate.add_argument("--seed", type=whole(0), default=0, help="of all draws (default: %(default)s)")
    evaluate.add_argument("--device", type=device, default="cpu", help="of LPIPS and features (default: %(default)s)")
    evaluate.add_argument("--skip-unusable", action="store_true", help="leave out pictures that cannot be used")
    evaluate.set_defaults(run=_evaluate)

    compare = commands.add_parser("compare", help="reports of `uiface evaluate` side by side")
    compare.add_argument("reports", type=path, nargs="+", help="two or more folders with report.json, or such files")
    compare.add_argument("--output", type=path, help="folder for comparison.html and comparison.json")
    compare.set_defaults(run=_compare)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="uiface", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    prepare = commands.add_parser(
        "prepare",
        help="align and embed photographs, once",
        description="Photographs -> cache of aligned, embedded faces. Run it again to go on. SOURCE is a folder"
        " ROOT/IDENTITY/*.jpg, InsightFace's RecordIO (train.rec and train.idx), webdataset shards (*.tar), a set of"
        " `uiface generate`, or a cache.",
        epilog="example: uiface prepare photos --output cache/photos --encoder buffalo_l",
    )
    prepare.add_argument("source", type=path, help="folder, train.rec or tar shards")
    prepare.add_argument("--output", type=path, required=True, help="the cache's folder")
    _add_encoder_arguments(prepare)
    prepare.add_argument(
        "--image-size", type=whole(), default=128, help="side of the stored faces (default: %(default)s)"
    )
    prepare.add_argument("--face", choices=("largest", "central"), default="largest", help="which of several faces")
    prepare.add_argument("--aligned", action="store_true", help="the pictures are aligned faces already: no detection")
    prepare.add_argument("--identities", type=path, help="file with the identities to take, one name per line")
    prepare.add_argument("--min-images", type=whole(), default=1, help="leave out identities with fewer photographs")
    prepare.add_argument(
        "--outlier-threshold",
        type=real(-1, 1),
        default=0.2,
        help="least cosine of a face to the median of its identity's embeddings (default: %(default)s)",
    )
    prepare.add_argument("--drop-outliers", action="store_true", help="leave outliers out")
    prepare.add_argument(
        "--min-in-frame",
        type=real(0, 1),
        metavar="SHARE",
        help="skip faces of whose aligned picture less than this share lies within the photograph",
    )
    prepare.add_argument(
        "--threads", type=whole(), default=1, help="photographs at the same time (default: %(default)s)"
    )
    prepare.set_defaults(run=_prepare)

    convert = commands.add_parser(
        "convert",
        help="a data set in another form",
        description="Identity folders, RecordIO and webdataset shards into each other. The pictures' files stay as"
        " they are, identities keep their names. OUTPUT appears when it is complete.",
        epilog="example: uiface convert faces_webface_112x112 webface --format imagefolder",
    )
    convert.add_argument("source", type=path, help="folder, .rec file or tar shards")
    convert.add_argument("output", type=path, help="folder that is not there yet, or empty")
    convert.add_argument("--format", required=True, choices=("imagefolder", "recordio", "webdataset"))
    convert.add_argument(
        "--nested",
        action="store_true",
        help="SOURCE is PERSON/VIDEO/*.jpg: each folder in it is one person, with all pictures in folders within",
    )
    convert.set_defaults(run=_convert)

    _add_generate(commands)
    _add_identities(commands)
    _add_audit(commands)
    _add_verification(commands)

    convert = commands.add_parser(
        "convert-original",
        help="the published UIFace weights -> a pipeline folder",
        description="The published checkpoint, and CompVis' VQ-f4 first stage or a diffusers VQModel -> a pipeline.",
    )
    convert.add_argument("--unet", type=path, required=True, help="the denoiser's file")
    convert.add_argument("--vq-encoder", type=path, help="first stage: file with encoder and quant_conv")
    convert.add_argument("--vq-decoder", type=path, help="first stage: file with decoder and quantization")
    convert.add_argument("--vq-model", help="first stage: a diffusers VQModel instead of the two files")
    convert.add_argument(
        "--model-config", type=path, help="JSON of the reference's options, if not the published ones"
    )
    convert.add_argument("--sample-size", type=whole(), default=32, help="of the latents (default: %(default)s)")
    convert.add_argument("--identity-encoder", help="name of the recognizer of the embeddings, as elasticface")
    convert.add_argument("--output", type=path, required=True, help="the pipeline's folder")
    convert.set_defaults(run=_convert_original)

    _add_evaluate(commands)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(expand_home(argv))
    try:
        args.run(args)
    except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"uiface {args.command}: {paragraph(error)}")


if __name__ == "__main__":
    main()
