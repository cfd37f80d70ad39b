"""The report of a data set: as JSON, and as a page that needs no other file."""

import base64
import html
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from ..files import brief, complete_file, write_json
from .answers import Answer, Row, arrange
from .figures import Figure
from .plots import Picture

REPORT = "report.json"
STYLE = """
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76em; margin: 0 auto; padding: 1em; color: #222; }
h1 { font-size: 1.6em; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.2em; margin: 1.6em 0 .3em; }
p { overflow-wrap: anywhere; }
div.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5em 0; }
th, td { border-bottom: 1px solid #ddd; padding: .3em .8em .3em 0; text-align: left; vertical-align: top; }
th { font-weight: 600; }
td.value, th.value { text-align: right; white-space: nowrap; padding-left: .8em; }
td.value { font-variant-numeric: tabular-nums; }
small { display: block; color: #666; font-weight: normal; white-space: normal; }
details { margin: .5em 0; }
details td { overflow-wrap: anywhere; }
summary { cursor: pointer; color: #0645ad; }
div.pictures { columns: 30em; column-gap: 1em; }
figure { margin: 0 0 1em; break-inside: avoid; }
figcaption { font-weight: 600; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
"""


def _png_bytes(picture: Picture) -> bytes:
    buffer = io.BytesIO()
    if isinstance(picture, PIL.Image.Image):
        picture.save(buffer, "png")
    else:
        picture.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of plain text; a line within a cell is a paragraph."""
    lines = ["".join(f"<th>{html.escape(text)}</th>" for text in head)]
    lines += ["".join(f"<td>{html.escape(text).replace(chr(10), '<br>')}</td>" for text in row) for row in rows]
    return _scrolling(lines)


def _scrolling(rows: Sequence[str]) -> str:
    """A table of rows that is wider than a telephone."""
    return '<div class="scroll"><table>\n' + "\n".join(f"<tr>{row}</tr>" for row in rows) + "\n</table></div>\n"


def _folded(summary: str, body: str) -> str:
    return f"<details>\n<summary>{html.escape(summary)}</summary>\n{body}</details>\n"


def answer_sections(answers: Sequence[Answer], sets: Sequence[str]) -> str:
    """The questions in their order, each with a table and, folded, what its figures say.

    Args:
        answers: of `arrange`.
        sets: names of the data sets: columns within each network's, where there are several.
    """
    body = ""
    for answer in answers:
        body += f"<h2>{html.escape(answer.question.text)}</h2>\n"
        if answer.rows:
            body += _answer_table(answer, sets)
            details = [("\n".join([row.label, row.conditions]).strip(), *_meaning(row)) for row in answer.rows]
            explained = table(("figure", "what it says", "measured with"), details)
            body += _folded("What the figures say, and how they were measured", explained)
        else:
            body += paragraphs([f"Not measured: it needs {answer.question.needs}."])
    return body


def _answer_table(answer: Answer, sets: Sequence[str]) -> str:
    several = len(sets) > 1
    span = f' colspan="{len(sets)}"' if several else ""
    heads = [f'<th class="value"{span}>{html.escape(network)}</th>' for network in answer.networks]
    rows = ["<th></th>" + "".join(heads)] if any(answer.networks) or not several else []
    if several:
        names = "".join(f'<th class="value">{html.escape(name)}</th>' for name in sets)
        rows.append("<th></th>" + names * len(heads))
    for row in answer.rows:
        label = html.escape(row.label)
        label += f"<small>{html.escape(row.conditions)}</small>" if row.conditions else ""
        cells = [f"<th>{label}</th>" if row.headline else f"<td>{label}</td>"]
        for network in answer.networks:
            for position in range(len(sets)):
                real = html.escape(row.real_text(network, position))
                beside = f"<small>real faces {real}</small>" if real else ""
                cells.append(f'<td class="value">{html.escape(row.text(network, position))}{beside}</td>')
        rows.append("".join(cells))
    return _scrolling(rows)


def _meaning(row: Row) -> tuple[str, str]:
    """What a row says, and all conditions of its figures, a line each."""
    shown = [figure for figures in (row.figures, row.real) for each in figures.values() for figure in each if figure]
    lines = (dict.fromkeys(each) for each in zip(*((f.meaning, f.measured_with) for f in shown), strict=True))
    meanings, conditions = ("\n".join(each) for each in lines)
    return meanings, conditions


def paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p>{html.escape(line)}</p>\n" for line in lines)


def page(title: str, body: str) -> str:
    title = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}</body>\n</html>\n"
    )


def render_report(report: dict[str, Any], pictures: Sequence[tuple[str, Picture]]) -> str:
    """A report as one HTML page.

    Args:
        report: as `evaluate_dataset` returns it.
        pictures: with their captions.
    """
    body = paragraphs([report["dataset"]["summary"]])
    shown = []
    for caption, picture in pictures:
        data, caption = base64.b64encode(_png_bytes(picture)).decode(), html.escape(caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        shown.append(f"<figure>\n<figcaption>{caption}</figcaption>\n{image}\n</figure>\n")
    body += f'<div class="pictures">\n{"".join(shown)}</div>\n'
    body += answer_sections(arrange([figures_of(report)]), [report["dataset"]["name"]])
    if report["notes"]:
        body += "<h2>Notes</h2>\n" + paragraphs(report["notes"])
    settings = report["settings"] | report["versions"]
    body += _folded("Settings and versions", table(("setting", "value"), [(n, str(v)) for n, v in settings.items()]))
    return page(f"Evaluation of {report['dataset']['name']}", body)


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
        figures_of(report)
        for name in ("name", "path", "summary"):
            report["dataset"][name] + ""
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {brief(error)}"
        raise ValueError(f"{path} is no report of `uiface evaluate`, or a damaged one ({reason}).") from error
    return report


def figures_of(report: dict[str, Any]) -> list[Figure]:
    return [Figure.from_json(figure) for figure in report["figures"]]
