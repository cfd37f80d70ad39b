"""The parsers of `uiface` stand apart from the package: they load nothing heavy, and say what the package says."""

import argparse
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from types import NoneType
from typing import get_args

import pytest
from conftest import REPOSITORY, complaint

import uiface_cli
from uiface_cli.generate import MODELS_OWN, SAMPLING
from uiface_cli.options import TRAIN_MODULES, with_hyphens
from uiface_diffusers import UIFacePipeline, generate_dataset
from uiface_diffusers.banks import identities_from_images, load_bank
from uiface_diffusers.convert_original import convert_original
from uiface_diffusers.data import convert_dataset, prepare_faces
from uiface_diffusers.evaluation import evaluate_dataset
from uiface_diffusers.evaluation.cleaning import clean_dataset
from uiface_diffusers.evaluation.leakage import audit_dataset
from uiface_diffusers.faces import FaceEncoder
from uiface_diffusers.generation import make_identities
from uiface_diffusers.pipeline_uiface import MODEL_DEFAULTS


def commands(parser: argparse.ArgumentParser | None = None) -> dict[str, argparse.ArgumentParser]:
    """Every command, groups of them included, by its words."""
    parser = uiface_cli.build_parser() if parser is None else parser
    found = {parser.prog.removeprefix("uiface").strip(): parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                found |= commands(inner)
    return found


COMMANDS = commands()


def options(command: str) -> dict[str, argparse.Action]:
    return {action.dest: action for action in COMMANDS[command]._actions}


def test_help_loads_nothing_heavy():
    code = """
        import contextlib, io, sys, uiface_cli
        for words in sys.argv[1:]:
            with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
                uiface_cli.main([*words.split(), "--help"])
            print(words, sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)))
            assert printed.getvalue().startswith(f"usage: uiface {words}".strip()), words
            heavy = {"torch", "diffusers", "transformers", "onnxruntime", "cv2", "numpy", "PIL", "uiface_diffusers"}
            assert not heavy & sys.modules.keys(), words
    """
    assert len(COMMANDS) >= 15
    command = [sys.executable, "-c", textwrap.dedent(code), *COMMANDS]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_cannot_be_imported_is_named():
    code = "import sys, uiface_cli; sys.modules['torch'] = None; uiface_cli.main(['identities', 'inspect', 'bank'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("uiface identities: ") and "torch" in result.stderr


def test_what_an_extra_installs_is_named_with_it(tmp_path, monkeypatch):
    extra = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in extra}
    assert {{"scikit-learn": "sklearn"}.get(name, name) for name in names} == TRAIN_MODULES
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = complaint("verify", "toy", "--benchmarks", tmp_path, "--output", tmp_path / "out")
    assert said == (
        "uiface verify: matplotlib is not installed: it comes with the extra `train`, pip install"
        ' "uiface-diffusers[train]".'
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_are_understood(name):
    parser = COMMANDS[name]
    lines = (parser.epilog or "").replace("\\\n", " ").splitlines()
    examples = [shlex.split(line, comments=True) for line in lines if line.startswith("  uiface ")]
    if name:
        assert parser.description and examples
    for words in examples:
        assert words[1:][: len(name.split())] == name.split()
        assert callable(uiface_cli.build_parser().parse_args(words[1:]).run)


def test_sampling_options_are_those_of_the_pipelines_call():
    defaults = UIFacePipeline.sampling_defaults()
    ours = {name: option.default for name, option in SAMPLING.items()}
    assert ours == defaults | dict.fromkeys(MODEL_DEFAULTS, MODELS_OWN)
    annotations = {
        name: each.annotation for name, each in inspect.signature(UIFacePipeline.__call__).parameters.items()
    }
    texts = {"7": {int, float}, "0.5": {float}, "none": {NoneType}, "true": {bool}, "200,1000": {tuple}}
    for name, option in SAMPLING.items():
        kinds = {getattr(kind, "__origin__", kind) for kind in get_args(annotations[name]) or (annotations[name],)}
        taken = set()
        for text in texts:
            try:
                taken.add(type(option.type(text)))
            except argparse.ArgumentTypeError:
                continue
        # words are of one option each: the default is one
        assert taken | ({str} & kinds) == kinds, name
        if option.default != MODELS_OWN:
            assert option.type(str(option.default)) == option.default
        assert options("generate")[name].help.endswith(f"(default: {str(option.default).lower()})")
        assert options("generate")[name].default is argparse.SUPPRESS


def defaults_of(function) -> dict:
    parameters = inspect.signature(function).parameters.items()
    return {name: each.default for name, each in parameters if each.default is not inspect.Parameter.empty}


@pytest.mark.parametrize(
    ("command", "function", "own"),
    [
        ("prepare", prepare_faces, set()),
        ("convert", convert_dataset, set()),
        # fewer of the model's own identities
        ("generate", generate_dataset, {"images_per_identity"}),
        ("identities make", make_identities, set()),
        ("identities make", identities_from_images, {"encoder"}),
        ("identities make", UIFacePipeline.__call__, set()),
        ("audit", audit_dataset, set()),
        ("clean", clean_dataset, set()),
        ("convert-original", convert_original, set()),
        ("evaluate", evaluate_dataset, set()),
    ],
)
def test_defaults_are_those_of_the_function(command, function, own):
    defaults = {name: value for name, value in defaults_of(function).items() if name in options(command).keys() - own}
    ours = {name: options(command)[name].default for name in defaults}
    assert defaults and {name: tuple(value) if value == [] else value for name, value in ours.items()} == defaults


def test_defaults_of_the_encoder_are_its_own():
    defaults = defaults_of(FaceEncoder)
    commands = [name for name in COMMANDS if "encoder_root" in options(name)]
    assert len(commands) == 11
    for command in commands:
        ours = {name.removeprefix("encoder_"): action.default for name, action in options(command).items()}
        assert {name: ours[name] for name in ("root", "providers", "det_size")}.items() <= defaults.items()
        assert ours["encoder"] == (None if command in ("demo", "generate") else defaults["name"])


def test_underscores_are_accepted(tmp_path):
    words = ["prepare", "a_b", "--output", "c_d", "--encoder_root=e_f", "--det_size", "320", "--min-images", "2"]
    args = uiface_cli.build_parser().parse_args(with_hyphens(words))
    assert (str(args.source), str(args.output), args.encoder_root) == ("a_b", "c_d", "e_f")
    assert (args.det_size, args.min_images) == (320, 2)
    assert with_hyphens(["x", "--a_b", "--", "--a_b"]) == ["x", "--a-b", "--", "--a_b"]
    spelled = [word for parser in COMMANDS.values() for action in parser._actions for word in action.option_strings]
    assert len(spelled) > 80 and not [word for word in spelled if "_" in word]


def test_photographs_need_an_encoder(tmp_path):
    with pytest.raises(ValueError, match="holds photographs: an encoder is needed"):
        identities_from_images(tmp_path, tmp_path / "bank", 2)
    with pytest.raises(ValueError, match="no cache of prepared faces"):
        load_bank(tmp_path)
    assert not list(tmp_path.iterdir())
