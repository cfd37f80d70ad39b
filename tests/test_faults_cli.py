"""What people type first and wrongly: the error names option, value and range, and is no traceback."""

import argparse
import ast
import json
import os
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from accelerate import cpu_offload
from conftest import REPOSITORY, complaint, draw_person, tiny_components, write_toy_pack

from uiface_cli.options import expand_home, json_object
from uiface_diffusers import IdentityBank, UIFacePipeline, cli
from uiface_diffusers.data import LatentSet
from uiface_diffusers.evaluation.face_set import computed_once
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.fingerprint import pipeline_fingerprint
from uiface_diffusers.generation import make_identities
from uiface_diffusers.training.options import add_optimizer_arguments, parse_recipe, run_script
from uiface_diffusers.training.schedules import schedule_settings

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1000\n"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--guidance-scale", "high", "'high' is not a number from 0 on, nor none"),
        ("--guidance-scale", "nan", "'nan' is not a number from 0 on, nor none"),
        ("--guidance-scale", "inf", "'inf' is not a number from 0 on, nor none"),
        ("--injection", "strong", "'strong' is not one of both, self, cross, nor none"),
        ("--injection-strength", "2", "'2' is not a number from 0 to 1, nor none"),
        ("--boundary-threshold", "x", "'x' is not a number from 0 on, nor none"),
        ("--boundary", "late", "'late' is not adaptive, nor none, nor a whole number from 0 on"),
        ("--boundary", "1.5", "'1.5' is not adaptive, nor none, nor a whole number from 0 on"),
        ("--latest-boundary", "-1", "'-1' is not a whole number from 0 on, nor none"),
        ("--guide-from-boundary", "2", "'2' is not true or false"),
        ("--guidance-interval", "900,100", "'900,100' is not two timesteps, the lower one first"),
        ("--num-inference-steps", "0", "'0' is not a whole number from 1 on"),
        ("--reuse-empty-branch", "half", "'half' is not a whole number from 1 on"),
        ("--det-size", "300", "'300' is not a multiple of 32 from 32 on"),
        ("--min-similarity", "7", "'7' is not a number from -1 to 1"),
        ("--shard", "3/3", "'3/3' is not i/n with i from 0 to n - 1"),
        ("--device", "nowhere", "'nowhere' is not a device of torch here"),
    ],
)
def test_values_are_named_with_their_range(option, value, message):
    assert f"argument {option}: {message}" in complaint("generate", f"{option}={value}")


def test_values_that_are_right_are_taken(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    words = ["generate", "--output=~/faces", "--guidance-scale", "2.5", "--boundary", "600", "--injection", "None"]
    words += ["--guidance-interval", "(200, 1000)", "--guide-from-boundary", "True", "--latest-boundary", "none"]
    args = cli.build_parser().parse_args(expand_home(words))
    assert (args.guidance_scale, args.boundary, args.injection, args.latest_boundary) == (2.5, 600, None, None)
    assert args.guidance_interval == (200, 1000) and args.guide_from_boundary is True
    assert str(args.output) == "/home/somebody/faces"


def parsers(parser: argparse.ArgumentParser, name: str = "uiface"):
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for command, inner in [item for action in actions for item in action.choices.items()]:
        yield from parsers(inner, f"{name} {command}")
    if not actions:
        yield name, parser


def test_every_numeric_option_of_every_command_has_a_range():
    """None is left to `int` or `float`, which take any number, or Python's words of it."""
    options = [(name, action) for name, parser in parsers(cli.build_parser()) for action in parser._actions]
    assert len({name for name, _ in options}) >= 10
    assert [f"{name} {action.dest}" for name, action in options if action.type in (int, float)] == []
    numeric = [action for _, action in options if isinstance(action.default, int | float) and action.type is not None]
    assert len(numeric) > 15
    for action in numeric:
        for value in ("nan", "many", "1e999", ""):
            with pytest.raises(argparse.ArgumentTypeError, match=repr(value)):
                action.type(value)


def test_a_provider_that_is_missing_is_refused(tmp_path, toy_root):
    pack = ["--encoder", "toy", "--encoder-root", str(toy_root)]
    message = complaint("prepare", str(tmp_path), "--output", str(tmp_path / "x"), *pack, "--providers", "tensorrt")
    assert "--providers: the execution provider `tensorrt`" in message and "onnxruntime has" in message


def test_home_is_expanded_in_options_and_recipes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home(["~", "~/a b", "--x=~/c", "--x", "a~b", "-~"]) == [
        str(tmp_path),
        f"{tmp_path}/a b",
        f"--x={tmp_path}/c",
        "--x",
        "a~b",
        "-~",
    ]
    IdentityBank(torch.eye(3, 16), "toy").save(tmp_path / "bank.safetensors")
    cli.main(["identities", "perturb", "~/bank.safetensors", "--output=~/turned.safetensors"])
    assert len(IdentityBank.load(tmp_path / "turned.safetensors")) == 3

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"data": ["~/one", "two"], "vae": "~/vq"}))
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--vae")
    parser.add_argument("--output")
    args = parse_recipe(parser, ["--config", "~/recipe.yaml", "--output", "~/out"])
    assert args.data == [f"{tmp_path}/one", "two"]
    assert (args.vae, args.output) == (f"{tmp_path}/vq", f"{tmp_path}/out")


def test_published_weights_and_identities_make_a_data_set(tmp_path, capsys):
    """The second half of the README's three commands."""
    UIFacePipeline(**tiny_components()).save_pretrained(tmp_path / "model")
    np.save(tmp_path / "identities.npy", 5 * np.eye(3, 16))
    source, bank = str(tmp_path / "identities.npy"), str(tmp_path / "b")
    cli.main(["identities", "import", source, "--encoder", "toy", "--output", bank])
    assert "3 identities of `toy`, 16-d" in (printed := capsys.readouterr().out)
    assert "3 were not of unit length" in printed and "0 are duplicates" in printed
    generate = ["generate", str(tmp_path / "model"), "--identities", bank, "--device", "cpu"]
    generate += ["--images-per-identity", "1", "--num-inference-steps", "1", "--output", str(tmp_path / "data")]
    cli.main(generate)
    assert len(list((tmp_path / "data" / "images").glob("*/*.png"))) == 3
    settings = json.loads((tmp_path / "data" / "generation.json").read_text())["settings"]
    assert settings["identity_encoder"] == "toy" and settings["identity_encoder_fingerprint"] is None

    message = complaint("identities", "import", str(tmp_path / "none.npy"), "--encoder", "a", "--output", "b")
    assert "uiface identities: " in message and "none.npy is missing" in message


@pytest.mark.parametrize(("content", "reason"), [(b"", "is empty"), (LFS_POINTER, "is a Git LFS pointer")])
def test_damaged_weights_of_a_pipeline_are_named(tmp_path, content, reason):
    UIFacePipeline(**tiny_components()).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(content)
    IdentityBank(torch.eye(3, 16), "toy").save(tmp_path / "bank")
    message = complaint("generate", str(tmp_path / "model"), "--identities", str(tmp_path / "bank"))
    assert f"{file} {reason}" in message
    (tmp_path / "bank").write_bytes(content)
    message = complaint("generate", str(tmp_path / "model"), "--identities", str(tmp_path / "bank"))
    assert f"bank {reason}" in message


def test_a_damaged_pack_is_named(tmp_path):
    write_toy_pack(tmp_path)
    (tmp_path / "models" / "toy" / "recognizer.onnx").write_bytes(LFS_POINTER)
    (tmp_path / "photographs" / "a").mkdir(parents=True)
    draw_person((0, 0, 255)).save(tmp_path / "photographs" / "a" / "0.png")
    pack = ["--encoder", "toy", "--encoder-root", str(tmp_path), "--output", str(tmp_path / "cache")]
    message = complaint("prepare", str(tmp_path / "photographs"), *pack)
    assert "recognizer.onnx is a Git LFS pointer" in message and not (tmp_path / "cache").exists()


def test_options_of_the_published_model_are_checked(tmp_path):
    (tmp_path / "cut.json").write_text('{"a": ')
    (tmp_path / "few.json").write_text('{"input_channels": 3}')
    torch.save({"weight": torch.zeros(2)}, tmp_path / "unet.pt")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    convert = ["convert-original", "--output", str(tmp_path / "out"), "--unet"]
    message = complaint(*convert, str(tmp_path / "unet.pt"), "--model-config", str(tmp_path / "cut.json"))
    assert "--model-config" in message and "cut.json is no JSON file" in message
    message = complaint(*convert, str(tmp_path / "unet.pt"), "--model-config", str(tmp_path / "few.json"))
    assert "options lack" in message and "`channel_multipliers`" in message
    assert "holds no state dict" in complaint(*convert, str(tmp_path / "tensor.pt"))


def test_options_that_a_schedule_reads_are_fixed():
    def settings(*argv: str) -> dict:
        parser = argparse.ArgumentParser()
        parser.add_argument("--max-train-steps", type=int, default=10)
        add_optimizer_arguments(parser, 0.1, "cosine_warm_restarts")
        return schedule_settings(parser.parse_args(argv))

    plain = settings()
    assert settings("--lr-restart-steps", "7") != plain != settings("--lr-restart-factor", "3")
    assert settings("--learning-rate", "1") != plain != settings("--lr-scheduler", "constant")
    # not read by it
    assert settings("--lr-warmup-steps", "7") == settings("--max-train-steps", "20") == plain
    cosine = settings("--lr-scheduler", "cosine")
    assert settings("--lr-scheduler", "cosine", "--lr-warmup-steps", "7") != cosine
    assert settings("--lr-scheduler", "cosine", "--max-train-steps", "20") != cosine
    assert settings("--lr-scheduler", "cosine", "--lr-restart-steps", "7") == cosine


def imports(path) -> set[tuple[str, bool]]:
    """Modules that a file imports, and whether within a function."""
    found, tree = set(), ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    late = {id(node) for function in functions for node in ast.walk(function)}
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node)]
    skipped = {id(node) for block in for_types for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {(alias.name.split(".")[0], id(node) in late) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module.split(".")[0], id(node) in late))
    return found


def test_what_is_imported_is_declared():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.match(r"[\w.-]+", each)[0].lower().replace("_", "-") for each in requirements}

    always, extras = names(project["dependencies"]), project["optional-dependencies"]
    optional = names(sum((extras[extra] for extra in ("train", "lmdb", "demo")), []))
    distributions = packages_distributions()
    missing, used = [], set()
    packages = ("uiface_cli", "uiface_diffusers")
    for path in sorted(path for package in packages for path in (REPOSITORY / package).rglob("*.py")):
        # the training scripts' share needs the extra, and so do plots
        needs_extra = path.parent.name == "training" or path.name == "plots.py"
        for module, late in imports(path):
            if module in sys.stdlib_module_names or module in packages:
                continue
            named = {name.lower().replace("_", "-") for name in distributions.get(module, [module])}
            used |= named
            if not named & (always | optional if late or needs_extra else always):
                missing.append(f"{path.name}: {module}")
    assert missing == []
    assert always - used == set()  # nothing is declared that is not imported


def test_rotated_photographs_are_prepared_and_embedded_alike(tmp_path, toy_root):
    """From the command line to `FaceEncoder.embed`: one picture, one embedding."""
    from uiface_diffusers.data import FaceCache
    from uiface_diffusers.faces import FaceEncoder

    (tmp_path / "source" / "a").mkdir(parents=True)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "source" / "a" / "0.png"
    draw_person((0, 255, 0), ((90, 70, 44),)).transpose(PIL.Image.Transpose.ROTATE_90).save(file, exif=exif)
    pack = ["--encoder", "toy", "--encoder-root", str(toy_root), "--det-size", "160"]
    cli.main(["prepare", str(tmp_path / "source"), "--output", str(tmp_path / "cache"), *pack, "--providers", "cpu"])
    encoder = FaceEncoder("toy", os.fspath(toy_root), det_size=160)
    embedded = encoder.embed([PIL.Image.open(file)]).embeddings
    assert torch.allclose(FaceCache(tmp_path / "cache").embeddings().embeddings, embedded, atol=1e-6)


@pytest.mark.parametrize(
    "error", [ValueError("both are `toy`"), FileNotFoundError(2, "none", "x"), ImportError("yaml")]
)
def test_scripts_end_with_a_message(error, monkeypatch):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    with pytest.raises(SystemExit, match=f"^train.py: {re.escape(str(error))}$"):
        run_script(main)
    # what is run, and not imported by a script beside it
    scripts = [file for file in (REPOSITORY / "training").rglob("*.py") if file.read_text().startswith("#!")]
    assert len(scripts) == 9
    for script in scripts:
        assert script.read_text().endswith('if __name__ == "__main__":\n    run_script(main)\n'), script


def test_numeric_options_of_scripts_have_a_range():
    for script in sorted((REPOSITORY / "training").rglob("*.py")):
        assert not re.search(r"type=(int|float|json\.loads)\b", script.read_text()), script


@pytest.mark.parametrize("text", ["{", "[1]", "3", "word"])
def test_options_in_json_are_objects(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a JSON object of options"):
        json_object(text)
    assert json_object('{"layers": 2}') == {"layers": 2}


def test_wrong_settings_of_new_identities_do_not_begin_a_folder(tmp_path, toy_root):
    pipeline, encoder = UIFacePipeline(**tiny_components()), FaceEncoder("toy", os.fspath(toy_root), det_size=160)
    for options, message in (
        ({"num_inference_steps": 0}, "`num_inference_steps` has to be a positive integer but is 0"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` has to be a finite number"),
        ({"guidance": 2}, "the pipeline's call has no argument 'guidance'"),
        ({"batch_size": 0}, "`batch_size` has to be positive but is 0"),
        ({"exclude": [IdentityBank(torch.eye(3), None)]}, "embeddings of 3 and of 16 numbers cannot be compared"),
    ):
        with pytest.raises(ValueError, match=message):
            make_identities(pipeline, encoder, 2, tmp_path / "bank", **options)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_elsewhere_have_no_fingerprint(tiny_pipeline):
    cpu_offload(tiny_pipeline.unet, "cpu")
    with pytest.raises(ValueError, match="UIFaceUNet2DModel are not at hand but on the meta device"):
        pipeline_fingerprint(tiny_pipeline)


def test_files_that_are_computed_once_and_damaged_are_named(tmp_path):
    rows = computed_once(tmp_path / "rows", 3, lambda part: torch.ones(len(part), 2), "rows")
    file = tmp_path / "rows" / "000000.safetensors"
    whole = file.read_bytes()
    for content, message in (
        (whole[:-4], "is damaged, cut short"),
        (b"", "is empty"),
        (LFS_POINTER, "is a Git LFS pointer"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"000000.safetensors {message}.*Delete it, and it is computed again"):
            computed_once(tmp_path / "rows", 3, None, "rows")
        with pytest.raises(ValueError, match="000000.safetensors"):
            LatentSet([file])
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="has 3 rows, not 4"):
        computed_once(tmp_path / "rows", 4, None, "rows")
    assert torch.equal(rows, computed_once(tmp_path / "rows", 3, None, "rows"))
    with pytest.raises(ValueError, match="has no tensor `latents`"):
        LatentSet([file])
