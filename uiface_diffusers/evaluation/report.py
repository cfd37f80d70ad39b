"""Figures of data sets: as JSON, as a page that needs no other file, and side by side."""

import base64
import html
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import PIL.Image

from ..files import brief, complete_file, write_json

REPORT = "report.json"
STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 68em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border-bottom: 1px solid #ddd; padding: .3em .8em; text-align: left; vertical-align: top; }
td.value { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
"""


# name -> label, unit ("%": a share, shown in hundredths; "x 1000": shown in thousandths), what it says
MEASURES = {
    "eer": ("Equal error rate", "%", "As many genuine pairs are rejected as impostor pairs are accepted."),
    "fmr100": ("FMR100", "%", "Genuine pairs rejected when at most 1 % of impostor pairs are accepted."),
    "fmr1000": ("FMR1000", "%", "Genuine pairs rejected when at most 0.1 % of impostor pairs are accepted."),
    "fdr": ("Fisher discriminant ratio", "", "Squared distance of the two means by the sum of the two variances."),
    "genuine_mean": ("Mean of genuine pairs", "", "Cosine of two images of one identity."),
    "genuine_std": ("Deviation of genuine pairs", "", "Standard deviation of these cosines."),
    "impostor_mean": ("Mean of impostor pairs", "", "Cosine of images of two identities; strangers have about 0."),
    "impostor_std": ("Deviation of impostor pairs", "", "Standard deviation of these cosines."),
    "uniqueness": (
        "Uniqueness",
        "%",
        "Identities that remain when each is dropped whose mean embedding is as near as the threshold to one kept"
        " before (DCFace's U_class). Falls as identities are added.",
    ),
    "consistency": (
        "Intra-class consistency",
        "%",
        "Images nearer than the threshold to the mean embedding of their identity, averaged over identities (DCFace's"
        " C_intra). Strangers pass too where an identity has few images, as each is part of the mean.",
    ),
    "consistency_others": (
        "Consistency, left out of the mean",
        "%",
        "The same with the mean of the identity's other images.",
    ),
    "impostors_above": ("Impostor pairs above the threshold", "%", "What that threshold means to this recognizer."),
    "context_cosine": (
        "Mean cosine to the context",
        "",
        "Of an image to its identity's embedding in the bank. Images of `--identity-perturbation` follow one that is"
        " turned away from it.",
    ),
    "context_nearest": ("Nearest to its own context", "%", "Images with no other identity's context nearer."),
    "leakage_images": (
        "Images near a real face",
        "%",
        "Nearest real embedding above the threshold of real impostors.",
    ),
    "leakage_identities": ("Identities near a real face", "%", "The same of the mean embeddings of the identities."),
    "leakage_strangers": ("Real images near another person", "%", "The same of real images: what strangers give."),
    "leakage_largest": ("Largest cosine to a real face", "", "Of any image to any real embedding."),
    "intra_class_lpips": (
        "Intra-class LPIPS",
        "",
        "Perceptual distance of images of one identity, averaged over identities; larger: more varied.",
    ),
    "kid": (
        "KID",
        "x 1000",
        "Kernel distance of generated faces to real ones; lower is better. Unbiased: about 0, also below, for faces"
        " that look the same. Depends on the real faces and on the numbers of faces and people.",
    ),
    "kid_std": ("Deviation of KID", "x 1000", "Over subsets of half the faces: about KID's standard error."),
    "kid_real": ("KID of real faces", "x 1000", "Of as many other real faces, of other people: what noise gives."),
    "c2st": (
        "Classifier two-sample test",
        "",
        "AUC of a classifier that tells generated from real faces, on people that it has not learned from; lower is"
        " better, 0.5: cannot be told apart, 1: always told apart.",
    ),
    "c2st_real": ("Classifier test of real faces", "", "Of as many other real faces, of other people."),
    "precision": (
        "Improved precision",
        "%",
        "Images of the set that lie among the real ones. It does not see broken faces; KID and the classifier"
        " test do.",
    ),
    "recall": ("Improved recall", "%", "Real images that lie among those of the set."),
    "class_precision": (
        "Improved precision within identities",
        "%",
        "Images of a person that lie among the real ones of that person, averaged over people.",
    ),
    "class_recall": (
        "Improved recall within identities",
        "%",
        "Real images of a person that lie among the set's of that person, averaged over people (with Inception"
        " features DCFace's D_intra).",
    ),
}


@dataclass
class Measure:
    """One figure of a data set.

    Args:
        name (`str`): the figure's, in `MEASURES`; of one that several networks give, with a network: `kid/alexnet`.
        value (`float`, *optional*): None if it is not finite.
        conditions (`dict`): with what it was measured. Figures of two sets can be compared when these are equal.
        detail (`str`): what else is to be known, as the number of pairs.
    """

    name: str
    value: float | None
    conditions: dict[str, Any] = field(default_factory=dict)
    detail: str = ""

    def __post_init__(self):
        if self.kind not in MEASURES:
            raise ValueError(f"there is no figure {self.name!r}.")
        if self.value is not None and not math.isfinite(self.value):
            self.value = None

    @property
    def kind(self) -> str:
        """Its name in `MEASURES`."""
        return self.name.partition("/")[0]

    @property
    def label(self) -> str:
        network = self.name.partition("/")[2]
        return MEASURES[self.kind][0] + (f" by {network}" if network else "")

    @property
    def measured_with(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.conditions.items())

    @property
    def title(self) -> str:
        return f"{self.label} ({self.measured_with})"

    @property
    def text(self) -> str:
        """The value for people."""
        if self.value is None:
            return "-"
        unit = MEASURES[self.kind][1]
        if unit == "x 1000":
            return f"{1000 * self.value:.1f} / 1000"
        return f"{100 * self.value:.2f} %" if unit == "%" else f"{self.value:.4f}"

    @property
    def meaning(self) -> str:
        return " ".join([MEASURES[self.kind][2], self.detail]).strip()

    def as_json(self) -> dict[str, Any]:
        """For `report.json`, which can be read without this package."""
        _, unit, meaning = MEASURES[self.kind]
        described = {"label": self.label, "unit": unit, "meaning": meaning, "detail": self.detail}
        return {"name": self.name, "value": self.value, "conditions": self.conditions, **described}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Measure":
        """
        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        name, value = content["name"], content["value"]
        value, detail = None if value is None else float(value), str(content.get("detail", ""))
        return cls(name, value, dict(content["conditions"]), detail)


def png_bytes(picture) -> bytes:
    """A `PIL.Image.Image` or a figure of matplotlib as a PNG file."""
    buffer = io.BytesIO()
    if isinstance(picture, PIL.Image.Image):
        picture.save(buffer, "png")
    else:
        picture.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], value_columns: Sequence[int]) -> str:
    """An HTML table of plain text."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(text)}</th>" for text in head) + "</tr>"]
    for row in rows:
        cells = [
            f'<td class="value">{html.escape(text)}</td>' if i in value_columns else f"<td>{html.escape(text)}</td>"
            for i, text in enumerate(row)
        ]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>\n"


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p>{html.escape(line)}</p>\n" for line in lines)


def _page(title: str, body: str) -> str:
    title = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}</body>\n</html>\n"
    )


def render_report(report: dict[str, Any], measures: Sequence[Measure], pictures: Sequence[tuple[str, bytes]]) -> str:
    """A report as one HTML page.

    Args:
        report: as `evaluate_dataset` returns it.
        measures: its figures.
        pictures: captions and PNG files.
    """
    rows = [(measure.label, measure.text, measure.meaning, measure.measured_with) for measure in measures]
    body = _paragraphs([report["dataset"]["summary"]])
    body += _table(("figure", "value", "what it says", "measured with"), rows, value_columns=[1])
    body += _paragraphs(report["notes"])
    for caption, picture in pictures:
        data, caption = base64.b64encode(picture).decode(), html.escape(caption)
        body += f'<h2>{caption}</h2>\n<img alt="{caption}" src="data:image/png;base64,{data}">\n'
    body += "<h2>Settings and versions</h2>\n"
    settings = report["settings"] | report["versions"]
    body += _table(("setting", "value"), [(name, str(value)) for name, value in settings.items()], value_columns=[])
    return _page(f"Evaluation of {report['dataset']['name']}", body)


def write_report(
    output: Path, report: dict[str, Any], measures: Sequence[Measure], pictures: Sequence[tuple[str, bytes]]
) -> None:
    """`report.html`, then `report.json`."""
    with complete_file(output / "report.html") as beside:
        # names of folders need not be valid text
        beside.write_text(render_report(report, measures, pictures), encoding="utf-8", errors="replace")
    write_json(output / REPORT, report)


def load_report(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the report of a data set.

    Args:
        path: `report.json`, or the folder that it is in.

    Raises:
        ValueError: it is missing, damaged, or another kind of report.
    """
    path = Path(path)
    path = path / REPORT if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} is missing: make it by `uiface evaluate`.")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        _measures(report)
        for name in ("name", "path", "summary"):
            report["dataset"][name] + ""
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {brief(error)}"
        raise ValueError(f"{path} is no report of `uiface evaluate`, or a damaged one ({reason}).") from error
    return report


def _measures(report: dict[str, Any]) -> list[Measure]:
    return [Measure.from_json(figure) for figure in report["figures"]]


@dataclass
class ComparedMeasure:
    """A figure of several data sets, measured with the same conditions in all of them.

    Args:
        label (`str`): the figure's.
        measured_with (`str`): the conditions.
        measures (`list[Measure | None]`): one a set; None where a set has none with these conditions.
    """

    label: str
    measured_with: str
    measures: list[Measure | None]

    @property
    def texts(self) -> list[str]:
        return ["-" if measure is None else measure.text for measure in self.measures]


@dataclass
class Comparison:
    """
    Args:
        sets (`list[str]`): names of the data sets.
        summaries (`list[str]`): their sizes.
        rows (`list[ComparedMeasure]`).
        notes (`list[str]`): which figures are not compared, and why.
    """

    sets: list[str]
    summaries: list[str]
    rows: list[ComparedMeasure]
    notes: list[str]

    def lines(self) -> list[str]:
        """For a terminal: an aligned table, with the conditions as footnotes."""
        conditions = list(dict.fromkeys(row.measured_with for row in self.rows))
        numbers = {text: f"[{number}]" for number, text in enumerate(conditions, start=1)}
        cells = [["figure", *self.sets]]
        cells += [[f"{row.label} {numbers[row.measured_with]}", *row.texts] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = []
        for title, *values in cells:
            aligned = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
            table.append("  ".join([title.ljust(widths[0]), *aligned]))
        summaries = [f"{name}: {summary}" for name, summary in zip(self.sets, self.summaries, strict=True)]
        return [*summaries, *table, *(f"{number} {text}" for text, number in numbers.items()), *self.notes]

    def write(self, output: Path) -> None:
        """`comparison.json` and `comparison.html`."""
        output.mkdir(parents=True, exist_ok=True)
        page = _table(("data set", "size"), list(zip(self.sets, self.summaries, strict=True)), value_columns=[])
        rows = [[row.label, *row.texts, row.measured_with] for row in self.rows]
        page += _table(["figure", *self.sets, "measured with"], rows, value_columns=range(1, len(self.sets) + 1))
        page += _paragraphs(self.notes)
        with complete_file(output / "comparison.html") as beside:
            beside.write_text(_page("Comparison of data sets", page), encoding="utf-8", errors="replace")
        rows = [[None if each is None else each.as_json() for each in row.measures] for row in self.rows]
        content = {"sets": self.sets, "summaries": self.summaries, "rows": rows, "notes": self.notes}
        write_json(output / "comparison.json", content)


def compare_reports(reports: Sequence[dict[str, Any]]) -> Comparison:
    """Figures of several data sets side by side. Only what was measured with the same conditions (recognizer, feature
    network, k, real set, ...) stands in one row; where a figure has different ones, a note says so.

    Args:
        reports: two or more, as `load_report` gives them.

    Raises:
        ValueError: fewer than two reports.
    """
    if len(reports) < 2:
        raise ValueError(f"a comparison needs two reports or more, not {len(reports)}.")
    of_sets = [{measure.title: measure for measure in _measures(report)} for report in reports]
    known = {title: measure for of_set in of_sets for title, measure in of_set.items()}
    # rows of one figure next to each other, in the order of `MEASURES`
    order = list(MEASURES)
    rows = [
        ComparedMeasure(known[title].label, known[title].measured_with, [of_set.get(title) for of_set in of_sets])
        for title in sorted(known, key=lambda title: order.index(known[title].kind))
    ]
    names = [report["dataset"]["name"] for report in reports]
    return Comparison(
        sets=[f"{name} [{i}]" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)],
        summaries=[report["dataset"]["summary"] for report in reports],
        rows=rows,
        notes=_differences(of_sets),
    )


def _differences(of_sets: Sequence[dict[str, Measure]]) -> list[str]:
    """Says which figures not all of the sets that have them have under the same conditions."""
    labels: dict[str, list[str]] = {}
    for name, (label, _, _) in MEASURES.items():
        measures = [[each for each in of_set.values() if each.kind == name] for of_set in of_sets]
        titles = [{each.title for each in of_set} for of_set in measures if of_set]
        if any(each != titles[0] for each in titles):
            labels.setdefault(_differing(list(chain.from_iterable(measures))), []).append(label)
    return [
        f"Measured with different conditions, in rows of their own: {', '.join(each)} ({differing})."
        for differing, each in labels.items()
    ]


def _differing(measures: Sequence[Measure]) -> str:
    """The conditions that are not the same in all, with their values."""
    names = dict.fromkeys(chain.from_iterable(measure.conditions for measure in measures))
    values = {name: list(dict.fromkeys(str(each.conditions.get(name, "-")) for each in measures)) for name in names}
    return "; ".join(f"{name}: {' | '.join(each)}" for name, each in values.items() if len(each) > 1)
