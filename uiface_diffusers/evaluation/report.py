"""Figures of data sets: as JSON, as a page that needs no other file, and side by side."""

import base64
import html
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import PIL.Image

from ..files import brief, complete_file, write_json
from . import registry
from .figures import Figure
from .plots import Picture

REPORT = "report.json"
STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 68em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border-bottom: 1px solid #ddd; padding: .3em .8em; text-align: left; vertical-align: top; }
td.value { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
"""


def _png_bytes(picture: Picture) -> bytes:
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


def render_report(report: dict[str, Any], pictures: Sequence[tuple[str, Picture]]) -> str:
    """A report as one HTML page.

    Args:
        report: as `evaluate_dataset` returns it.
        pictures: with their captions.
    """
    rows = [(each.label, each.text, each.meaning, each.measured_with) for each in _figures(report)]
    body = _paragraphs([report["dataset"]["summary"]])
    body += _table(("figure", "value", "what it says", "measured with"), rows, value_columns=[1])
    body += _paragraphs(report["notes"])
    for caption, picture in pictures:
        data, caption = base64.b64encode(_png_bytes(picture)).decode(), html.escape(caption)
        body += f'<h2>{caption}</h2>\n<img alt="{caption}" src="data:image/png;base64,{data}">\n'
    body += "<h2>Settings and versions</h2>\n"
    settings = report["settings"] | report["versions"]
    body += _table(("setting", "value"), [(name, str(value)) for name, value in settings.items()], value_columns=[])
    return _page(f"Evaluation of {report['dataset']['name']}", body)


def write_report(output: Path, report: dict[str, Any], pictures: Sequence[tuple[str, Picture]]) -> None:
    """`report.html`, then `report.json`."""
    with complete_file(output / "report.html") as beside:
        # names of folders need not be valid text
        beside.write_text(render_report(report, pictures), encoding="utf-8", errors="replace")
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
        _figures(report)
        for name in ("name", "path", "summary"):
            report["dataset"][name] + ""
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {brief(error)}"
        raise ValueError(f"{path} is no report of `uiface evaluate`, or a damaged one ({reason}).") from error
    return report


def _figures(report: dict[str, Any]) -> list[Figure]:
    return [Figure.from_json(figure) for figure in report["figures"]]


@dataclass
class ComparedFigure:
    """A figure of several data sets, measured with the same conditions in all of them.

    Args:
        label (`str`): the figure's.
        measured_with (`str`): the conditions.
        figures (`list[Figure | None]`): one per set; None where a set has none with these conditions.
    """

    label: str
    measured_with: str
    figures: list[Figure | None]

    @property
    def texts(self) -> list[str]:
        return ["-" if figure is None else figure.text for figure in self.figures]


@dataclass
class Comparison:
    """
    Args:
        sets (`list[str]`): names of the data sets.
        summaries (`list[str]`): their sizes.
        rows (`list[ComparedFigure]`).
        notes (`list[str]`): which figures are not compared, and why.
    """

    sets: list[str]
    summaries: list[str]
    rows: list[ComparedFigure]
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
        cells = [[row.label, *row.texts, row.measured_with] for row in self.rows]
        page += _table(["figure", *self.sets, "measured with"], cells, value_columns=range(1, len(self.sets) + 1))
        page += _paragraphs(self.notes)
        with complete_file(output / "comparison.html") as beside:
            beside.write_text(_page("Comparison of data sets", page), encoding="utf-8", errors="replace")
        rows = [[None if each is None else each.as_json() for each in row.figures] for row in self.rows]
        content = {"sets": self.sets, "summaries": self.summaries, "rows": rows, "notes": self.notes}
        write_json(output / "comparison.json", content)


def compare_reports(reports: Sequence[dict[str, Any]]) -> Comparison:
    """Figures of several data sets side by side. Only what was measured with the same conditions (recognizer, feature
    network, k, real set, ...) stands in one row; where a figure has different ones, a note says so.

    Args:
        reports: two or more, from `load_report`.

    Raises:
        ValueError: fewer than two reports.
    """
    if len(reports) < 2:
        raise ValueError(f"a comparison needs two reports or more, not {len(reports)}.")
    of_sets = [{figure.title: figure for figure in _figures(report)} for report in reports]
    known = {title: figure for of_set in of_sets for title, figure in of_set.items()}
    # rows of one figure next to each other, in the order of the report; figures of other versions last
    kinds = dict.fromkeys(
        chain(*(measure.figures for measure in registry.MEASURES), (each.kind for each in known.values()))
    )
    order = {kind: position for position, kind in enumerate(kinds)}
    rows = [
        ComparedFigure(figure.label, figure.measured_with, [of_set.get(title) for of_set in of_sets])
        for title, figure in sorted(known.items(), key=lambda item: order[item[1].kind])
    ]
    names = [report["dataset"]["name"] for report in reports]
    return Comparison(
        sets=[f"{name} [{i}]" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)],
        summaries=[report["dataset"]["summary"] for report in reports],
        rows=rows,
        notes=_differences(of_sets, order),
    )


def _differences(of_sets: Sequence[dict[str, Figure]], kinds: Iterable[str]) -> list[str]:
    """Says which figures not all of the sets that have them have under the same conditions."""
    labels: dict[str, list[str]] = {}
    for kind in kinds:
        figures = [[each for each in of_set.values() if each.kind == kind] for of_set in of_sets]
        titles = [{each.title for each in of_set} for of_set in figures if of_set]
        if any(each != titles[0] for each in titles):
            found = list(chain.from_iterable(figures))
            labels.setdefault(_differing(found), []).append(found[0].description.label)
    return [
        f"Measured with different conditions, in rows of their own: {', '.join(each)} ({differing})."
        for differing, each in labels.items()
    ]


def _differing(figures: Sequence[Figure]) -> str:
    """The conditions that are not the same in all, with their values."""
    names = dict.fromkeys(chain.from_iterable(figure.conditions for figure in figures))
    values = {name: list(dict.fromkeys(str(each.conditions.get(name, "-")) for each in figures)) for name in names}
    return "; ".join(f"{name}: {' | '.join(each)}" for name, each in values.items() if len(each) > 1)
