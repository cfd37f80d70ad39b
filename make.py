#!/usr/bin/env python3
"""Commands that need Python 3.11 and nothing else; a first run sets up a virtual environment in `.venv`.

    python3 make.py faces    # faces of four people by the embedded checkpoint, in faces/
    python3 make.py test     # the tests
    python3 make.py check    # ruff, mypy, the documentation and the wheel

What follows goes on to the command: `python3 make.py test tests/test_cli.py`. UIFACE_VENV names another environment.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# extra of the package, and the commands
COMMANDS: dict[str, tuple[str, list[list[str]]]] = {
    "faces": ("", [["uiface", "generate", "--output", "faces"]]),
    "test": ("dev", [["python", "-m", "pytest", "-n", "2", "--dist", "loadfile"]]),
    "check": (
        "dev",
        [
            ["ruff", "check", "."],
            ["ruff", "format", "--check", "."],
            ["mypy"],
            ["mkdocs", "build", "--strict", "--quiet"],
            ["python", ".ci/check_wheel.py"],
        ],
    ),
}


def environment(extra: str) -> Path:
    """The folder of the environment's programs, which are installed if that was not done for this pyproject.toml."""
    folder = Path(os.environ.get("UIFACE_VENV", ROOT / ".venv")).resolve()
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    # the one with the extra has all of the other
    if any((folder / f"installed-{each}").exists() and (folder / f"installed-{each}").read_text() == wanted
           for each in {extra, "dev"}):  # fmt: skip
        return programs
    print(f"setting up {folder}: minutes, the first time", flush=True)
    if subprocess.run([sys.executable, "-m", "venv", str(folder)]).returncode:
        sys.exit("no virtual environment: Debian and Ubuntu have what is missing in the package python3-venv")
    target = f"{ROOT}[{extra}]" if extra else str(ROOT)
    # not compiled: what is imported is compiled then, most of it never is
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    subprocess.run([programs / "python", "-m", "pip", "install", *quiet, "--no-compile", "-e", target], check=True)
    (folder / f"installed-{extra}").write_text(wanted)
    return programs


def main(words: list[str]) -> int:
    if not words or words[0] not in COMMANDS:
        sys.exit(str(__doc__))
    if sys.version_info < (3, 11):
        sys.exit(f"Python 3.11 or later is needed, this is {sys.version.split()[0]}: python3.11 make.py {words[0]}")
    extra, commands = COMMANDS[words[0]]
    programs = environment(extra)
    # programs that a command starts are the environment's, too
    variables = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    for command in commands:
        command = [*command, *words[1:]]
        print("+", *command, flush=True)
        failed = subprocess.run([programs / command[0], *command[1:]], cwd=ROOT, env=variables).returncode
        if failed:
            return failed
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"failed: {' '.join(map(str, error.cmd))}")
    except KeyboardInterrupt:
        sys.exit(130)
