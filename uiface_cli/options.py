"""What command lines share: types of options, whose errors name the value and the range; spellings; printed errors."""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def expand_home(argv: Sequence[str] | None = None) -> list[str]:
    """The words of a command line (`sys.argv` if not given) with `~` as the home folder: the shell leaves it in
    `--option=~/path` and in quotation marks."""
    argv = sys.argv[1:] if argv is None else argv
    home = re.compile(r"^(--[\w-]+=)?(~(?:/.*)?)$")
    return [home.sub(lambda found: f"{found[1] or ''}{Path(found[2]).expanduser()}", word) for word in argv]


def with_hyphens(argv: Sequence[str]) -> list[str]:
    """The words of a command line with `--encoder_root` as `--encoder-root`: both are accepted, values stay as they
    are."""
    end = argv.index("--") if "--" in argv else len(argv)
    names = [re.sub(r"^--[^=]+", lambda found: found[0].replace("_", "-"), word) for word in argv[:end]]
    return [*names, *argv[end:]]


# import names of what the extra `train` installs
TRAIN_MODULES = frozenset({"datasets", "lpips", "matplotlib", "onnx2torch", "sklearn", "tensorboard", "torchvision"})


def complaint(error: Exception) -> str:
    """What is said of an error that a user can mend; of a module that an extra has, also where to get it."""
    module = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ImportError) and module in TRAIN_MODULES:
        return f'{module} is not installed: it comes with the extra `train`, pip install "uiface-diffusers[train]".'
    return paragraph(error)


def paragraph(error: object, most: int = 10) -> str:
    """An error's text for the command line: without empty lines, and at most so many of the others."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    more = [f"  ... and {len(lines) - most} more lines"] if len(lines) > most else []
    return "\n".join(lines[:most] + more)


def whole(least: int = 1, multiple_of: int = 1) -> Callable[[str], int]:
    """The type of a whole number of at least `least`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]+", text) or int(text) < least or int(text) % multiple_of:
            kind = "a whole number" if multiple_of == 1 else f"a multiple of {multiple_of}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind} from {least} on")
        return int(text)

    return parse


def real(low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """The type of a finite number within a range, its ends included."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not low <= value <= high:
            infinite = {(True, True): "", (False, True): f" from {low:g} on", (True, False): f" up to {high:g}"}
            within = infinite.get((low == -math.inf, high == math.inf), f" from {low:g} to {high:g}")
            raise argparse.ArgumentTypeError(f"{text!r} is not a number{within}")
        return value

    return parse


def one_of(*words: str) -> Callable[[str], str]:
    """The type of one of a few words."""

    def parse(text: str) -> str:
        if text not in words:
            kind = words[0] if len(words) == 1 else f"one of {', '.join(words)}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind}")
        return text

    return parse


def boundary_word(text: str) -> str:
    """The type of what names a boundary rule, of those that have a word for it."""
    from uiface_diffusers.two_stage.boundary import RULES

    if any(rule.accepts(text) for rule in RULES):
        return text
    return one_of(*(rule.word for rule in RULES if rule.word is not None))(text)


def any_of(*kinds: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of a value that one of several takes; the error has what each of them says."""

    def parse(text: str) -> Any:
        reasons = []
        for kind in kinds:
            try:
                return kind(text)
            except argparse.ArgumentTypeError as error:
                reasons.append(str(error).removeprefix(f"{text!r} is not "))
        raise argparse.ArgumentTypeError(f"{text!r} is not {', nor '.join(reasons)}")

    return parse


def path(text: str) -> Path:
    """The type of a path. An empty one, from a shell variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path")
    return Path(text)


def none(text: str) -> None:
    """The type of the word `none`."""
    if text.lower() != "none":
        raise argparse.ArgumentTypeError(f"{text!r} is not none")


def boolean(text: str) -> bool:
    """The type of `true` or `false`."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() == "true"


def timestep_pair(text: str) -> tuple[float, float]:
    """The type of two timesteps, `200,1000` or `(200, 1000)`."""
    words = text.strip("()[] ").split(",")
    try:
        low, high = (real(low=0)(word.strip()) for word in words)
    except (argparse.ArgumentTypeError, ValueError):
        low, high = 1, 0
    if low > high:
        raise argparse.ArgumentTypeError(f"{text!r} is not two timesteps, the lower one first, such as 200,1000")
    return low, high


def json_object(text: str) -> dict[str, Any] | None:
    """The type of options as a JSON object; `null` takes back what a recipe says."""
    try:
        options = json.loads(text)
    except ValueError:
        options = text
    if not isinstance(options, dict | None):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object of options, such as '{{\"layers\": 2}}'")
    return options


def part(text: str) -> tuple[int, int]:
    """The type of part i of n, `i/n`."""
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with i from 0 to n - 1, such as 0/3")
    return int(found[1]), int(found[2])


def device(text: str) -> str:
    """The type of a torch device that is there."""
    import torch

    try:
        torch.empty(0, device=text)
    except (AssertionError, RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} is not a device of torch here: {reason}") from error
    return text


def provider(text: str) -> str:
    """The type of an execution provider of onnxruntime that is there."""
    from uiface_diffusers.faces import execution_providers

    try:
        execution_providers([text])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text
