"""Verification under seeded corruptions of aligned faces: how a recognizer bears worse pictures than a benchmark's.

The corruptions follow the plan of ImageNet-C (Hendrycks & Dietterich 2019), five strengths each, with parameters for
112x112 faces.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import PIL.Image

from ..data.benchmarks import Benchmark
from ..faces import Recognizer
from ..files import write_json
from .verification import VerificationResult, embed_benchmark, measure_verification

STRENGTHS = (1, 2, 3, 4, 5)
# the side of a face that blur and low resolution are given for
SIDE = 112
# linear light of a byte, and photons that a sensor counts of a white pixel before it gets dark
GAMMA, PHOTONS = 2.2, 1000
GRAY = 128


def blur(face: np.ndarray, sigma: float, generator: np.random.Generator) -> np.ndarray:
    """Gaussian, `sigma` pixels of a 112x112 face."""
    return cv2.GaussianBlur(face, (0, 0), sigma * len(face) / SIDE, borderType=cv2.BORDER_REFLECT_101)


def low_resolution(face: np.ndarray, side: float, generator: np.random.Generator) -> np.ndarray:
    """Reduced to `side` of 112 pixels by averaging, and enlarged again, bicubic."""
    small = max(1, round(side * len(face) / SIDE))
    reduced = cv2.resize(face, (small, small), interpolation=cv2.INTER_AREA)
    return cv2.resize(reduced, face.shape[1::-1], interpolation=cv2.INTER_CUBIC)


def jpeg(face: np.ndarray, quality: float, generator: np.random.Generator) -> np.ndarray:
    """Saved as JPEG of this quality by Pillow, colors at half the resolution (4:2:0)."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(face).save(buffer, "jpeg", quality=int(quality), subsampling=2)
    return np.asarray(PIL.Image.open(buffer))


def occlusion(face: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """A gray square of this share of the area, anywhere within the face."""
    side = round(len(face) * share**0.5)
    top, left = (int(place) for place in generator.random(2) * (len(face) - side + 1))
    covered = face.copy()
    covered[top : top + side, left : left + side] = GRAY
    return covered


def darkness(face: np.ndarray, stops: float, generator: np.random.Generator) -> np.ndarray:
    """Half the light for each stop, with the shot noise of a sensor that counts 1000 photons of a white pixel at full
    light."""
    light = (np.arange(256) / 255) ** GAMMA * PHOTONS * 0.5**stops
    counted = np.round((np.arange(PHOTONS + 1) / PHOTONS) ** (1 / GAMMA) * 255).astype(np.uint8)
    return counted[np.minimum(generator.poisson(light[face]), PHOTONS)]


@dataclass(frozen=True)
class Corruption:
    """
    Args:
        apply: `(side, side, 3)` RGB bytes, a parameter and a generator -> RGB bytes.
        parameters: of the strengths 1 to 5.
    """

    apply: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
    parameters: tuple[float, float, float, float, float]


CORRUPTIONS = {
    "blur": Corruption(blur, (1.0, 1.5, 2.0, 3.0, 4.0)),
    "low_resolution": Corruption(low_resolution, (56, 40, 28, 20, 14)),
    "jpeg": Corruption(jpeg, (25, 18, 15, 10, 7)),
    "occlusion": Corruption(occlusion, (0.05, 0.1, 0.2, 0.3, 0.4)),
    "darkness": Corruption(darkness, (2, 4, 6, 7, 8)),
}


def corrupt(
    faces: np.ndarray, name: str, strength: int, seed: int = 0, positions: Sequence[int] | None = None
) -> np.ndarray:
    """Corrupts aligned faces. What happens to a face depends on the face, `seed` and its position only.

    Args:
        faces (`np.ndarray` of shape `(N, side, side, 3)`): RGB bytes.
        name (`str`): one of `CORRUPTIONS`.
        strength (`int`): 1 to 5.
        seed (`int`, defaults to 0): of all draws.
        positions (*optional*): N whole numbers from 0 on, by which the draws of faces differ; 0 to N - 1 by default.

    Returns:
        `np.ndarray` of the shape of `faces`: RGB bytes.

    Raises:
        ValueError: another name, strength, shape or type.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"{name!r} is no corruption: {', '.join(CORRUPTIONS)}.")
    if strength not in STRENGTHS:
        raise ValueError(f"a corruption's strength is 1 to 5, not {strength}.")
    if faces.dtype != np.uint8 or faces.ndim != 4 or faces.shape[1] != faces.shape[2] or faces.shape[3] != 3:
        raise ValueError(f"faces are (N, side, side, 3) bytes, not {faces.shape} of {faces.dtype}.")
    positions = range(len(faces)) if positions is None else positions
    corruption, number = CORRUPTIONS[name], list(CORRUPTIONS).index(name)
    parameter = corruption.parameters[strength - 1]
    corrupted = np.empty_like(faces)
    for place, (face, position) in enumerate(zip(faces, positions, strict=True)):
        generator = np.random.default_rng([seed, number, position])
        corrupted[place] = corruption.apply(np.ascontiguousarray(face), parameter, generator)
    return corrupted


@dataclass
class CorruptedBenchmark(Benchmark):
    """A benchmark whose faces are corrupted as they are read; a face's position is that of its image."""

    corruption: str = "blur"
    strength: int = 1
    seed: int = 0

    def face(self, position: int) -> np.ndarray:
        clean = super().face(position)
        return corrupt(clean[None], self.corruption, self.strength, self.seed, [position])[0]


@dataclass
class CorruptionResult:
    """
    Args:
        clean (`float`): accuracy of the benchmark as it is.
        accuracy (`dict[str, list[float]]`): corruption -> accuracy at the strengths 1 to 5, with the thresholds chosen
            on the corrupted faces of the other nine folds.
        at_clean_threshold (`dict[str, list[float]]`): the same at the benchmark's own mean threshold, as a system
            meets worse pictures than it was set up with.
    """

    clean: float
    accuracy: dict[str, list[float]]
    at_clean_threshold: dict[str, list[float]]


def verify_corruptions(
    recognizer: Recognizer,
    benchmark: Benchmark,
    clean: VerificationResult,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    seed: int = 0,
    done: Callable[[CorruptionResult], None] = lambda result: None,
) -> CorruptionResult:
    """A recognizer's accuracy on a benchmark for every corruption and strength. Both faces of a pair are corrupted.

    Args:
        recognizer: as `load_recognizer` gives it.
        benchmark: of aligned faces.
        clean: its result without corruptions.
        corruptions: names in `CORRUPTIONS`.
        seed (`int`, defaults to 0): of all draws.
        done: called with the results so far after each strength.
    """
    result = CorruptionResult(clean.accuracy, {}, {})
    for name in corruptions:
        result.accuracy[name], result.at_clean_threshold[name] = [], []
        for strength in STRENGTHS:
            title = f"{benchmark.name}, {name} {strength}"
            corrupted = CorruptedBenchmark(title, benchmark.images, benchmark.same, name, strength, seed)
            measured = measure_verification(embed_benchmark(recognizer, corrupted), benchmark.same, far=())
            right = (measured.genuine > clean.threshold).sum() + (measured.impostor <= clean.threshold).sum()
            result.accuracy[name].append(measured.accuracy)
            result.at_clean_threshold[name].append(float(right / len(benchmark)))
            done(result)
    return result


def corruption_table(results: dict[str, CorruptionResult]) -> str:
    """Results by the benchmark's name as text, in percent: accuracy, and in brackets that at the clean threshold."""
    lines = []
    for benchmark, result in results.items():
        lines.append(f"{benchmark}: clean {100 * result.clean:.2f}; strengths 1 to 5, mean:")
        for name, rates in result.accuracy.items():
            pairs = [*zip(rates, result.at_clean_threshold[name], strict=True)]
            pairs.append((float(np.mean(rates)), float(np.mean(result.at_clean_threshold[name]))))
            shown = "  ".join(f"{100 * own:6.2f} ({100 * at_clean:.2f})" for own, at_clean in pairs)
            lines.append(f"  {name:<14}  {shown}")
    return "\n".join(lines)


def save_corruptions(results: dict[str, CorruptionResult], name: str, seed: int, output: Path) -> None:
    """Writes `corruptions.json` of a recognizer `name`, with the parameters, into a folder."""
    parameters = {corruption: list(each.parameters) for corruption, each in CORRUPTIONS.items()}
    benchmarks = {benchmark: vars(result) for benchmark, result in results.items()}
    content = {"recognizer": name, "seed": seed, "parameters": parameters, "benchmarks": benchmarks}
    write_json(output / "corruptions.json", content)
