"""The bench: recognizers trained on several sets under one recipe, measured on the same benchmarks, in one table."""

import gc
import hashlib
import io
import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import IResNetConfig
from ..data.benchmarks import Benchmark, read_benchmarks
from ..data.labeled_faces import LabeledFaces
from ..evaluation import load_recognizer, verify_benchmarks
from ..evaluation.figures import Figure
from ..evaluation.paired import pack_answers
from ..evaluation.report import REPORT, load_report
from ..files import check_settings, complete_file, local_path, read_json, write_json
from . import face_recognition
from .options import INDIFFERENT
from .recognition import LEAST_ACCURACY, RESULTS

# in the folder of the bench, and of each set
SETTINGS = "settings.json"
TABLE, PAGE = "bench.json", "bench.md"
# of a set: the report of `uiface evaluate`
EVALUATION = "evaluation"
# of one training: benchmark -> accuracy, and benchmark -> which pairs are told right
VERIFICATION, ANSWERS = "verification.json", "answers.json"
# options that the table has a row for, each
OF_ROWS = {"train_data", "seed"}
# and those that a recipe must not have, with the reason
REFUSED = {"max_train_hours": "tables of two machines would differ", "push_to_hub": "recognizers are not uploaded"}


class TrainingFailed(RuntimeError):
    """One training could not be done; others may."""


def train_and_verify(
    recipe: Path,
    sets: Sequence[str | os.PathLike],
    folder: Path,
    seed: int,
    benchmarks: Path | Sequence[Benchmark],
    weights: Sequence[float] | None = None,
) -> dict[str, float]:
    """Trains a recognizer in this process and measures it, or goes on where that was interrupted. What is finished is
    not done again.

    Args:
        recipe: YAML file of options of `training/train_face_recognition.py`.
        sets: what is trained on together.
        folder: of the recognizer; the accuracies are written to `verification.json`, and what `pack_answers` gives of
            each benchmark's pairs to `answers.json`.
        seed: of the training.
        benchmarks: what `verify_benchmarks` takes.
        weights (*optional*): one per set: how often a face of it is drawn, relative to the others'.

    Returns:
        Accuracy by benchmark.

    Raises:
        TrainingFailed: the data cannot be trained on, the loss was not finite, or another training works there.
    """
    file = folder / VERIFICATION
    if not file.exists():
        words = ["--config", str(recipe), "--train-data", *map(str, sets), "--output-dir", str(folder)]
        words += [] if weights is None else ["--train-data-weights", *map(str, weights)]
        try:
            face_recognition.main([*words, "--seed", str(seed), "--resume-from-checkpoint", "latest"])
        except (OSError, RuntimeError, ValueError) as error:
            raise TrainingFailed(f"{folder}: {error}") from error
        gc.collect()  # a recognizer and its optimizer are circles
        results = verify_benchmarks(load_recognizer(folder), benchmarks)
        write_json(folder / ANSWERS, {name: pack_answers(result.right) for name, result in results.items()})
        write_json(file, {name: result.accuracy for name, result in results.items()})
    return read_json(file)


def mean_text(values: Collection[float], scale: float = 1, digits: int = 4) -> str:
    """Mean and, of two or more, standard deviation (of the sample)."""
    if not values:
        return "-"
    spread = f" +- {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits}f}{spread}"


def name_sets(sets: Sequence[str | os.PathLike]) -> dict[str, Path]:
    """Data sets by their names: `NAME=PATH`, or a path whose folder's name it is.

    Raises:
        ValueError: two have the same name.
    """
    named = []
    for word in [os.fspath(each) for each in sets]:
        name, equals, path = word.partition("=")
        if not equals or Path(word).exists():
            found = local_path(word).resolve()
            name, path = (found.parent if found.is_file() else found).name, word
        named.append((name, local_path(path)))
    twice = [name for name, number in Counter(name for name, _ in named).items() if number > 1]
    if twice:
        raise ValueError(f"two data sets have the name {twice[0]}: give them as NAME=PATH, with other names.")
    wrong = [name for name, _ in named if not name or "/" in name or name.startswith(".")]
    if wrong:
        raise ValueError(f"{wrong[0]!r} cannot be the name of a folder of results: give the data set as NAME=PATH.")
    return dict(named)


def recipe_settings(recipe: Path, output: Path) -> dict[str, Any]:
    """The options of a recipe that its results depend on, defaults among them.

    Raises:
        ValueError: it is missing or damaged, an option or a value is wrong, or it has one of `REFUSED`.
    """
    if not recipe.is_file():
        raise ValueError(f"{recipe} is missing: the recipe is a YAML file of options.")
    words = ["--config", str(recipe), "--train-data", "-", "--output-dir", str(output)]
    written = io.StringIO()
    try:
        with redirect_stderr(written):
            args = vars(face_recognition.parse_args(words))
    except SystemExit as error:
        # without the usage of the training script, which nobody called
        reason = " ".join(written.getvalue().rpartition("error: ")[2].split())
        raise ValueError(f"the recipe {recipe} cannot be used: {reason}") from error
    for name, reason in REFUSED.items():
        if args[name]:
            raise ValueError(f"{recipe} has {name.replace('_', '-')}: {reason}. Take it out.")
    return {name: value for name, value in args.items() if name not in INDIFFERENT | OF_ROWS | REFUSED.keys()}


def benchmark_fingerprint(benchmark: Benchmark) -> str:
    digest = hashlib.sha256(benchmark.same.tobytes())
    for image in benchmark.images:
        digest.update(image)
    return digest.hexdigest()[:12]


def run_bench(
    sets: Sequence[str | os.PathLike],
    recipe: str | os.PathLike,
    benchmarks: str | os.PathLike,
    output: str | os.PathLike,
    seeds: Sequence[int] = (0, 1, 2),
    measure: Callable[[Path, Path], None] | None = None,
) -> dict[str, Any]:
    """Trains a recognizer on each of several sets, with each seed, and measures it. After every training it writes the
    table so far to `bench.json` and `bench.md`. The same call goes on where an earlier one was stopped, to the same
    table. Sets and seeds may be added later.

    Args:
        sets: data sets of aligned faces, see `name_sets`.
        recipe: YAML file of options of `training/train_face_recognition.py`.
        benchmarks: folder of InsightFace's `.bin` files, or one of them.
        output: folder of the table; what belongs to one training is in `NAME/seed-N`.
        seeds: of the trainings of each set.
        measure (*optional*): called with each set and the folder of its report, `NAME/evaluation`, as
            `evaluate_dataset` writes it. Reports that are there are part of the table.

    Returns:
        The content of `bench.json`.

    Raises:
        ValueError: a set, the recipe or a benchmark cannot be used; or the folder was begun with others.
        RuntimeError: some trainings failed; all others are in the table.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("the bench trains in one process: start it without `accelerate launch` or torchrun.")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"a seed is given twice: {', '.join(map(str, seeds))}.")
    recipe, output, named = local_path(recipe), local_path(output), name_sets(sets)
    options = recipe_settings(recipe, output)
    size, least = IResNetConfig(**options["recognizer"]).image_size, options["min_images_per_identity"]
    faces = {name: LabeledFaces([path], size, least) for name, path in named.items()}
    read = read_benchmarks(benchmarks)
    fixed = options | {f"benchmark {each.name}": benchmark_fingerprint(each) for each in read}
    check_settings(output / SETTINGS, fixed)
    for name, each in faces.items():
        check_settings(output / name / SETTINGS, {"data set": each.fingerprint})
    rows: dict[str, dict[str, Any]] = {
        name: {
            "path": str(named[name]),
            "fingerprint": each.fingerprint,
            "images": len(each),
            "identities": each.num_identities,
        }
        for name, each in faces.items()
    }
    del faces
    if measure is not None:
        for name, path in named.items():
            measure(path, output / name / EVALUATION)

    names = [each.name for each in read]
    failed: list[str] = []
    table = _write(output, recipe, options, rows, seeds, names)
    for seed in tqdm(seeds, desc="seed", unit="seed", disable=None):
        for name, path in named.items():
            try:
                train_and_verify(recipe, [path], output / name / f"seed-{seed}", seed, read)
            except TrainingFailed as error:
                failed.append(str(error))
            table = _write(output, recipe, options, rows, seeds, names)
    if failed:
        raise RuntimeError(f"{len(failed)} trainings failed, the others are in {output / PAGE}:\n" + "\n".join(failed))
    return table


def _write(
    output: Path,
    recipe: Path,
    options: dict[str, Any],
    rows: dict[str, dict[str, Any]],
    seeds: Sequence[int],
    benchmarks: Sequence[str],
) -> dict[str, Any]:
    """Collects what is finished, and writes table and page."""
    sets = {name: row | _collect(output / name, seeds) for name, row in rows.items()}
    table = {"recipe": recipe.name, "options": options, "seeds": list(seeds), "benchmarks": list(benchmarks)}
    table = json.loads(json.dumps(table | {"sets": sets}))
    write_json(output / TABLE, table)
    with complete_file(output / PAGE) as beside:
        beside.write_text("\n".join(page(table)) + "\n", encoding="utf-8", errors="replace")
    return table


def _collect(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """What there is of one set: accuracies and what was learned by seed, and the figures of its report."""
    accuracy, learned = {}, {}
    for seed in seeds:
        file = folder / f"seed-{seed}" / VERIFICATION
        if file.exists():
            of_seed = read_json(file)
            accuracy[str(seed)] = of_seed | {"mean": statistics.mean(of_seed.values())}
            if file.with_name(RESULTS).exists():
                learned[str(seed)] = read_json(file.with_name(RESULTS))["accuracy"]
    found: dict[str, Any] = {"accuracy": accuracy, "learned": learned}
    if (folder / EVALUATION / REPORT).exists():
        report = load_report(folder / EVALUATION)
        found["evaluation"] = {"summary": report["dataset"]["summary"], "figures": report["figures"]}
    return found


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown; the first column is of names, the others of numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def page(table: dict[str, Any]) -> list[str]:
    """The table as Markdown: mean and standard deviation over the seeds, each training, the figures of the sets."""
    benchmarks, seeds, sets = [*table["benchmarks"], "mean"], table["seeds"], table["sets"]
    lines = ["# Bench", "", f"Recipe `{table['recipe']}`, seeds {', '.join(map(str, seeds))}. Verification accuracy"]
    lines += ["in percent, mean +- standard deviation over the seeds (of the sample). `learned` is the share of the"]
    lines += ["training's own faces that were classified right with the margin in the last epoch.", ""]
    rows = []
    for name, row in sets.items():
        done = list(row["accuracy"].values())
        cells = [mean_text([each[benchmark] for each in done], 100, 2) for benchmark in benchmarks]
        learned = mean_text(row["learned"].values(), 100, 2)
        size = f"{row['images']:,} of {row['identities']:,}"
        rows.append([name, size, f"{len(done)} of {len(seeds)}", *cells, learned])
    lines += markdown_table(["set", "images of identities", "trainings", *benchmarks, "learned"], rows)
    unlearned = [
        f"{name} with seed {seed}"
        for name, row in sets.items()
        for seed, share in row["learned"].items()
        if share < LEAST_ACCURACY
    ]
    if unlearned:
        lines += ["", f"Hardly learned, so that the recipe and not the set is measured: {', '.join(unlearned)}."]
    lines += ["", "## Each training", ""]
    rows = [
        [name, seed, *(f"{100 * accuracies[benchmark]:.2f}" for benchmark in benchmarks)]
        for name, row in sets.items()
        for seed, accuracies in row["accuracy"].items()
    ]
    lines += markdown_table(["set", "seed", *benchmarks], rows)
    return lines + _figures(sets)


def _figures(sets: dict[str, dict[str, Any]]) -> list[str]:
    """The reports of the sets side by side; only figures with the same conditions share a row."""
    reports = {name: row["evaluation"] for name, row in sets.items() if "evaluation" in row}
    if not reports:
        return []
    found = {
        name: {figure.title: figure for figure in map(Figure.from_json, report["figures"])}
        for name, report in reports.items()
    }
    titles = dict.fromkeys(title for figures in found.values() for title in figures)
    cells = [[t, *(figures[t].text if t in figures else "-" for figures in found.values())] for t in titles]
    lines = ["", "## The sets, by `uiface evaluate`", ""]
    lines += [f"- {name}: {report['summary']}" for name, report in reports.items()]
    return [*lines, "", *markdown_table(["figure", *found], cells)]
