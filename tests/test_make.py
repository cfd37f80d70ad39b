"""The two commands of the README, without what they install."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-ins are shell scripts")


def make(*words: str, environment: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "make.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"UIFACE_VENV": str(environment)})


@pytest.fixture
def environment(tmp_path) -> Path:
    """An environment that is installed for this pyproject.toml, with programs that print how they are called."""
    (tmp_path / "bin").mkdir()
    for name in ("uiface", "python"):
        program = tmp_path / "bin" / name
        program.write_text('#!/bin/sh\necho "$(basename "$0") in $(pwd)" "$@"; [ "$1" != generate ] || exit 3\n')
        program.chmod(0o755)
    digest = hashlib.sha256((REPOSITORY / "pyproject.toml").read_bytes()).hexdigest()
    (tmp_path / "installed-dev").write_text(digest)
    return tmp_path


def test_what_is_installed_is_not_installed_again(environment):
    result = make("test", "tests/test_cli.py", environment=environment)
    assert result.returncode == 0 and "setting up" not in result.stdout
    assert f"python in {REPOSITORY} -m pytest -n 2 --dist loadfile tests/test_cli.py\n" in result.stdout


def test_a_command_that_fails_ends_with_its_code(environment):
    result = make("faces", environment=environment)
    assert f"uiface in {REPOSITORY} generate --output faces\n" in result.stdout and result.returncode == 3


def test_an_unknown_command_prints_the_known_ones(environment):
    for words in ((), ("fces",)):
        result = make(*words, environment=environment)
        assert result.returncode == 1 and "python3 make.py faces" in result.stderr


def test_ci_runs_the_readme_s_test_command():
    readme = (REPOSITORY / "README.md").read_text()
    (block,) = re.findall(r"<!-- test -->\n(.*?)<!-- end -->", readme, re.DOTALL)
    assert re.findall(r"^python3 make\.py .*$", block, re.MULTILINE) == ["python3 make.py test"]
    assert "bash .ci/run" in (REPOSITORY / ".github/workflows/ci.yml").read_text()
