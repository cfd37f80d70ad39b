import contextlib
import inspect
import io
import re
import shlex
import sys

import pytest
from conftest import REPOSITORY

from uiface_diffusers import cli

sys.path.insert(0, str(REPOSITORY / "training"))
sys.path.insert(0, str(REPOSITORY / "training" / "studies"))
import ablation  # noqa: E402
import distill_encoder  # noqa: E402
import evaluate  # noqa: E402
import export_checkpoint  # noqa: E402
import sampling_settings  # noqa: E402
import train  # noqa: E402
import train_autoencoder  # noqa: E402
import train_face_recognition  # noqa: E402
import train_identity_flow  # noqa: E402

TRAININGS = (distill_encoder, train, train_autoencoder, train_face_recognition, train_identity_flow)
SCRIPTS = (*TRAININGS, evaluate, export_checkpoint, ablation, sampling_settings)
PARSERS = {f"{script.__name__}.py": script.parse_args for script in SCRIPTS}
START = "(?:python training/|accelerate launch training/|uiface )"
DOCUMENTS = ["*.md", "docs/**/*.md", "training/configs/*.yaml", "training/*.py", "training/*/*.py"]


def commands() -> list[str]:
    """Command lines in the documents: a line of its own that starts as one, or a quotation within a line."""
    found = []
    for pattern in DOCUMENTS:
        for path in sorted(REPOSITORY.glob(pattern)):
            text = path.read_text()
            if path.suffix == ".py":
                text = inspect.cleandoc(text.partition('"""')[2].partition('"""')[0]).replace("\\\\", "\\")
            text = re.sub(r"^#", "", text, flags=re.MULTILINE) if path.suffix == ".yaml" else text
            text = re.sub(r"\\\n\s*", " ", text)  # continued lines
            quoted = re.findall(rf"`({START}[^`]*)`", re.sub(r"\s+", " ", text))
            lines = re.findall(rf"^ *({START}.*)$", text, re.MULTILINE)
            found += [f"{path.name}: {line}" for line in quoted + lines]
    return found


def words_of(command: str) -> list[str]:
    return shlex.split(command.partition(": ")[2], comments=True)


def is_whole(command: str) -> bool:
    """Not an outline, as `uiface generate ...` or `--output DIR`."""
    words = words_of(command)
    name = 3 if words[1:2] == ["identities"] else 2
    return len(words) > name and "..." not in words and not any(word.isupper() for word in words)


@pytest.mark.parametrize("command", filter(is_whole, commands()))
def test_commands_in_the_documents_are_understood(command, monkeypatch):
    """Options exist, required ones are there, recipes are read. Nothing is run."""
    words = words_of(command)
    monkeypatch.chdir(REPOSITORY)
    complaint = io.StringIO()
    while words[0] in ("python", "accelerate", "launch", "-W", "ignore"):
        words = words[1:]
    name = words[0].rpartition("/")[2]
    parse = cli.build_parser().parse_args if name == "uiface" else PARSERS[name]
    with contextlib.redirect_stderr(complaint):
        try:
            parse(words[1:])
        except SystemExit:
            pytest.fail(complaint.getvalue())


def test_commands_are_found():
    assert len(list(filter(is_whole, commands()))) > 20
