#!/usr/bin/env python
"""Builds the wheel from what git tracks, and checks that it has every file of the packages and nothing else.

python .ci/check_wheel.py [FOLDER]    # keeps the wheel there
"""

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("uiface_cli", "uiface_diffusers")
MAX_SIZE = 60  # MiB; most of it is the embedded checkpoint


def build(folder: Path) -> Path:
    """A wheel of a copy: setuptools would take what an earlier build left in `build/`."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    copy = folder / "copy"
    for name in filter(None, tracked.split("\0")):
        if name.split("/")[0] in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(copy)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def complaints(wheel: Path, copy: Path) -> list[str]:
    wanted = {str(file.relative_to(copy)) for name in PACKAGES for file in (copy / name).rglob("*") if file.is_file()}
    wanted = {name for name in wanted if "egg-info" not in name}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entries = archive.read(f"{info}/entry_points.txt").decode()
    found = {name for name in names if not name.startswith(f"{info}/")}
    version = re.search(r'^__version__ = "(.*)"', (copy / "uiface_diffusers/__init__.py").read_text(), re.MULTILINE)[1]
    said = [f"{name} is missing" for name in sorted(wanted - found)]
    said += [f"{name} does not belong there" for name in sorted(found - wanted)]
    if f"{info}/licenses/LICENSE" not in names:
        said.append("the license is missing")
    if metadata["Version"] != version:
        said.append(f"its version is {metadata['Version']}, that of uiface_diffusers/__init__.py {version}")
    if "uiface = uiface_cli:main" not in entries:
        said.append("the command uiface is missing")
    if wheel.stat().st_size > MAX_SIZE * 2**20:
        said.append(f"it is larger than {MAX_SIZE} MiB")
    return said


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        said = complaints(wheel, Path(folder) / "copy")
        with zipfile.ZipFile(wheel) as archive:
            print(f"{wheel.name}: {len(archive.namelist())} files, {wheel.stat().st_size / 2**20:.1f} MiB")
        if sys.argv[1:]:
            Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
            shutil.copy(wheel, sys.argv[1])
    if said:
        sys.exit("\n".join(said))


if __name__ == "__main__":
    main()
