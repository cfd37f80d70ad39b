"""What the study has found so far: figures from its folder, kept in a small file, and the page made of them."""

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
from diffusers.utils import make_image_grid

from uiface_diffusers.evaluation.paired import Interval, resample_accuracies, unpack_answers
from uiface_diffusers.evaluation.prediction import rank_predictors
from uiface_diffusers.faces import load_photograph
from uiface_diffusers.files import complete_file, read_json, write_json
from uiface_diffusers.training.bench import ANSWERS, VERIFICATION, markdown_table, mean_text
from uiface_diffusers.training.recognition import RESULTS

# arms of one or two stages that differ in the stages alone, of which the better ones are compared
ONE_STAGE = ("single_guidance_1", "single_guidance_2", "single")
TWO_STAGES = ("fixed_mean", "fixed_median", "adaptive", "adaptive_self", "adaptive_cross", "uiface")
# what else is compared
COMPARED = (
    ("adaptive", "fixed_mean"),
    ("adaptive", "fixed_median"),
    ("adaptive_self", "adaptive"),
    ("adaptive_cross", "adaptive"),
    ("uiface", "adaptive"),
    ("single_idperturb", "single"),
    ("uiface_idperturb", "uiface"),
    ("uiface_idperturb", "single_idperturb"),
    ("uiface_flow", "single_flow"),
    ("uiface_flow", "uiface_idperturb"),
    ("real_and_uiface", "real_and_single"),
)
# figures of a set without those of the real faces that it is compared with, sizes and settings
NO_PREDICTORS = ("kid_std", "kid_real", "c2st_real", "images", "identities", "boundary", "capped")
SHOWN = ("intra_class_lpips", "precision", "recall", "eer", "consistency_others", "context_cosine", "kid", "c2st")
QUANTILES = [f"{kind}_{name}" for kind in ("genuine", "impostor") for name in ("low", "median", "high")]


def groups_of(args: argparse.Namespace, arm: str) -> list[Path]:
    """The arm's data sets, one per group of identities."""
    return [args.folder / arm / f"group-{number}" for number in range(args.groups)]


def boundaries_of(folders: Iterable[Path]) -> list[int]:
    """The timesteps from which the faces of data sets follow their identity."""
    tables = [pq.read_table(folder / "metadata.parquet", columns=["boundary_timestep"]) for folder in folders]
    return [timestep for table in tables for timestep in table["boundary_timestep"].to_pylist()]


def saved_results(args: argparse.Namespace) -> dict[str, Any]:
    """The figures beside `--results`."""
    return read_json(args.results.with_suffix(".json"))


def saved_arms(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    return saved_results(args).get("sizes", {}).get(str(args.size), {})


def figures_of(report: dict[str, Any]) -> dict[str, float]:
    """All figures of a group by their names, and the recognizer's."""
    found = {}
    for figure in report["figures"]:
        recognizer = figure["conditions"].get("recognizer")
        found[figure["name"] + (f" by {recognizer}" if recognizer else "")] = figure["value"]
    return {name: value for name, value in found.items() if value is not None}


def collect(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What is saved and what `--work` has: arm -> its size; figure -> value by group; seed -> what a recognizer has
    learned of its own faces, its accuracy in each test and its answers to the pairs."""
    saved, table = saved_arms(args), {}
    for arm in dict.fromkeys([*args.all_arms, *saved]):  # also those that this command does not make
        row = saved.get(arm, {})
        latest = args.generated.get(arm, {}).get("latest_boundary", args.latest_boundary)
        for folder in () if arm in args.mixed else groups_of(args, arm):
            report = folder.with_name(f"evaluation-{folder.name}") / "report.json"
            content = read_json(report) if report.exists() else {"figures": []}
            found = figures_of(content)
            if report.exists():
                found |= {size: content["dataset"][size] for size in ("images", "identities")}
            if (folder / "metadata.parquet").exists():
                boundaries = np.array(boundaries_of([folder]))
                found |= {"boundary": float(boundaries.mean()), "capped": float((boundaries <= latest).mean())}
            for figure, value in found.items():
                row.setdefault("figures", {}).setdefault(figure, {})[folder.name] = value
        for seed in args.seeds:
            folder = args.folder / arm / f"recognizer-{seed}"
            if (folder / VERIFICATION).exists():
                of_seed = {"accuracy": read_json(folder / VERIFICATION), "answers": read_json(folder / ANSWERS)}
                if (folder / RESULTS).exists():  # not if the recipe ends a training by the clock
                    of_seed["learned"] = read_json(folder / RESULTS)["accuracy"]
                row.setdefault("recognizers", {})[str(seed)] = of_seed
        if row:
            table[arm] = row
    return table


def is_finished(args: argparse.Namespace, arm: str) -> bool:
    """Whether all figures of an arm are saved."""
    row = saved_arms(args).get(arm, {})
    measured = row.get("figures", {}).get("images", {})
    evaluated = arm in args.mixed or all(folder.name in measured for folder in groups_of(args, arm))
    return evaluated and all(str(seed) in row.get("recognizers", {}) for seed in args.seeds)


def write_picture(args: argparse.Namespace) -> str:
    """Faces of one person of two groups each, one row per arm and a column the same noise, as JPEG beside `--results`.
    Not before all arms are generated. Returns its name; none if it is not there."""
    file = args.results.with_name(f"{args.results.stem}_{args.size}.jpg")
    groups = [[folder / "images" for folder in groups_of(args, arm)[:2]] for arm in args.generated]
    if all((images.parent / "preview.png").exists() for folders in groups for images in folders):
        cells = []
        for folders in groups:
            for images in folders:
                first = sorted(images.iterdir())[0]
                cells += [PIL.Image.fromarray(load_photograph(face)) for face in sorted(first.iterdir())[:5]]
        grid = make_image_grid(cells, rows=len(groups), cols=len(cells) // len(groups))
        with complete_file(file) as beside:
            grid.save(beside, "jpeg", quality=90)
    return file.name if file.exists() else ""


def kind_of(figure: str) -> str:
    return figure.partition(" by ")[0].partition("/")[0]


def set_columns(arms: dict[str, dict[str, Any]], kinds: Sequence[str], recognizer: str) -> list[str]:
    """Figures of some kinds that an arm has, by any network; of recognizers, by the one that is asked for, but for the
    cosine to the context, which is the encoder's."""
    known = dict.fromkeys(figure for row in arms.values() for figure in row.get("figures", {}))
    return [
        figure
        for kind in kinds
        for figure in known
        if kind_of(figure) == kind
        and (" by " not in figure or kind == "context_cosine" or figure.endswith(recognizer))
    ]


def set_table(arms: dict[str, dict[str, Any]], columns: Sequence[str]) -> list[str]:
    """Mean and deviation over the groups."""
    rows = [
        [arm, *(mean_text(row["figures"].get(column, {}).values(), digits=3) for column in columns)]
        for arm, row in arms.items()
        if "figures" in row
    ]
    return markdown_table(["arm", *columns], rows)


def accuracy_table(arms: dict[str, dict[str, Any]], tests: Sequence[str]) -> list[str]:
    """Mean and deviation over the seeds, in percent; then each seed's mean over the tests."""
    rows = []
    for arm, row in arms.items():
        figures, seeds = row.get("figures", {}), row.get("recognizers", {}).values()
        sizes = [f"{sum(figures[size].values()):,}" if size in figures else "-" for size in ("images", "identities")]
        boundary = mean_text(figures.get("boundary", {}).values(), digits=0).partition(" ")[0]
        capped = mean_text(figures.get("capped", {}).values(), 100, 0).partition(" ")[0]
        cells = [mean_text([each["accuracy"][test] for each in seeds], 100, 2) for test in tests]
        means = [statistics.mean(each["accuracy"].values()) for each in seeds]
        cells += [mean_text(means, 100, 2), ", ".join(f"{100 * mean:.2f}" for mean in means) or "-"]
        learned = mean_text([each["learned"] for each in seeds if "learned" in each], 100, 0)
        rows.append([arm, *sizes, boundary, capped, *cells, learned])
    head = ["arm", "faces", "people", "boundary", "at the cap, %", *tests, "mean", "mean of each seed", "learned, %"]
    return markdown_table(head, rows)


def compared_arms(means: dict[str, float], mixed: Iterable[str]) -> dict[tuple[str, str], str]:
    """Which arms are compared, of those that have accuracies: (first, second) -> why."""

    def best(names: Iterable[str]) -> str:
        return max((name for name in names if name in means), key=means.__getitem__, default="")

    single, generated = best(ONE_STAGE), [name for name in means if name != "real" and name not in mixed]
    pairs = {(best(TWO_STAGES), single): "the best of two stages, the best of one"}
    pairs |= {(best(generated), "real"): "the best generated one, real faces"}
    pairs |= {(best(mixed), "real"): "the best of real and generated faces, real ones"}
    pairs |= {pair: "" for pair in COMPARED if pair not in pairs}
    pairs |= {(name, single): "" for name in generated if (name, single) not in pairs}
    return {pair: why for pair, why in pairs.items() if pair[0] != pair[1] and means.keys() >= set(pair)}


def interval_text(interval: Interval) -> str:
    return f"{100 * interval.value:+.2f} [{100 * interval.low:+.2f}, {100 * interval.high:+.2f}]"


def difference_table(args: argparse.Namespace, arms: dict[str, dict[str, Any]], means: dict[str, float]) -> list[str]:
    """Differences in points, with 95 % intervals."""
    names, seeds = list(means), [str(seed) for seed in args.seeds]
    answers = [
        np.array([[unpack_answers(arms[arm]["recognizers"][seed]["answers"][test], len(people)) for seed in seeds]
                  for arm in names])
        for test, people in args.people.items()
    ]  # fmt: skip
    accuracies = resample_accuracies(answers, list(args.people.values()))
    rows = []
    for (first, second), why in compared_arms(means, args.mixed).items():
        intervals = accuracies.difference(names.index(first), names.index(second))
        rows.append([f"{first} - {second}" + (f" ({why})" if why else ""), *map(interval_text, intervals)])
    return markdown_table(["difference, points", *args.people, "mean"], rows)


def prediction_table(arms: dict[str, dict[str, Any]], means: dict[str, float]) -> list[str]:
    """Rank correlations of all figures of the sets with the mean accuracy, over all arms and without `real`."""
    values: dict[str, dict[str, float]] = {}
    for arm, row in arms.items():
        for figure, groups in row.get("figures", {}).items():
            if kind_of(figure) not in NO_PREDICTORS:
                values.setdefault(figure, {})[arm] = statistics.mean(groups.values())
    generated = {
        each.figure: each
        for each in rank_predictors(values, {arm: mean for arm, mean in means.items() if arm != "real"})
    }
    rows = []
    for each in rank_predictors(values, means):
        without = generated.get(each.figure)
        cells = ["-", "-"] if without is None else [f"{without.correlation:+.2f}", str(without.sets)]
        rows.append([each.figure, f"{each.correlation:+.2f}", str(each.sets), *cells])
    return markdown_table(["figure of the set", "rank correlation", "arms", "generated arms only", "arms"], rows)


def study_page(args: argparse.Namespace, content: dict[str, Any], pictures: dict[int, str]) -> list[str]:
    """The page, in Markdown."""
    settings = content["settings"]
    judge = settings["judge"]
    tests = ", ".join(f"{name} ({len(each)} pairs of {each.max() + 1} people)" for name, each in args.people.items())
    lines = [
        f"Printed by `training/studies/ablation.py`: pipeline {settings['pipeline']}, sampling"
        f" `{settings['sampling']}`, recognizers with seeds {', '.join(map(str, args.seeds))}, tests {tests}."
    ]
    if "sampling" in content:
        columns = list(next(iter(content["sampling"].values())))
        rows = [[name, *(f"{row[c]:.4f}" for c in columns)] for name, row in content["sampling"].items()]
        lines += ["", "Sampling settings, measured first:", "", *markdown_table(["setting", *columns], rows)]
    for size, arms in sorted(content["sizes"].items(), key=lambda item: int(item[0])):
        done = {
            arm: statistics.mean(statistics.mean(each["accuracy"].values()) for each in row["recognizers"].values())
            for arm, row in arms.items()
            if row.get("recognizers", {}).keys() >= {str(seed) for seed in args.seeds}
        }
        lines += ["", f"## {int(size):,} faces", ""]
        missing = [arm for arm in args.all_arms if arm not in done]
        lines += [f"Not finished: {', '.join(missing)}.", ""] if missing else []
        lines += ["Verification accuracy in percent, mean +- standard deviation over the seeds.", ""]
        lines += accuracy_table(arms, list(args.people))
        if len(done) > 1:
            lines += ["", "Paired differences with 95 % intervals, by a bootstrap over people and seeds. Which arm is"]
            lines += [
                "best was decided by the same pairs, which flatters it.",
                "",
                *difference_table(args, arms, done),
            ]
        for title, kinds in (
            (f"The sets, mean +- standard deviation over {settings['groups']} groups of identities.", SHOWN),
            (f"Cosines of pairs by {judge}: quantiles of 5 (low), 50 and 95 % (high).", QUANTILES),
        ):
            columns = set_columns(arms, kinds, f" by {judge}")
            lines += ["", title, "", *set_table(arms, columns)] if columns else []
        lines += ["", "What predicts the accuracy: Spearman's rank correlation over the arms.", ""]
        lines += prediction_table(arms, done)
        if pictures.get(int(size)):
            order = ", ".join(args.generated)
            lines += ["", f"![Faces, one row per arm, in a column the same noise]({pictures[int(size)]})", ""]
            lines += [f"Five faces of each of two people; the rows are {order}."]
    return lines


def write_results(args: argparse.Namespace, studies: list[argparse.Namespace]) -> str:
    """Writes figures and page; returns the page."""
    content = saved_results(args)
    content["sizes"] = content.get("sizes", {}) | {str(study.size): collect(study) for study in studies}
    write_json(args.results.with_suffix(".json"), content)
    lines = study_page(args, content, {study.size: write_picture(study) for study in studies})
    with complete_file(args.results) as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "\n".join(lines)
