"""Reports of several data sets side by side."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..files import complete_file, write_json
from . import registry
from .answers import arrange, described
from .figures import Figure, Question
from .report import answer_sections, figures_of, page, paragraphs, table


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
    def question(self) -> Question:
        return described(next(figure for figure in self.figures if figure is not None)).description.question

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
        """For a terminal: an aligned table, question by question, with the conditions as footnotes."""
        by_question: dict[Question, list[ComparedFigure]] = {question: [] for question in Question}
        for row in self.rows:
            by_question[row.question].append(row)
        by_question = {question: rows for question, rows in by_question.items() if rows}
        conditions = dict.fromkeys(row.measured_with for rows in by_question.values() for row in rows)
        numbers = {text: f"[{number}]" for number, text in enumerate(conditions, start=1)}
        cells = {
            question: [[f"{row.label} {numbers[row.measured_with]}", *row.texts] for row in rows]
            for question, rows in by_question.items()
        }
        head = ["figure", *self.sets]
        widths = [max(map(len, column)) for column in zip(head, *chain(*cells.values()), strict=True)]
        lines = [f"{name}: {summary}" for name, summary in zip(self.sets, self.summaries, strict=True)]
        lines.append(_aligned(head, widths))
        for question, rows in cells.items():
            lines += [question.text, *(_aligned(row, widths) for row in rows)]
        return [*lines, *(f"{number} {text}" for text, number in numbers.items()), *self.notes]

    def write(self, output: Path) -> None:
        """`comparison.json` and `comparison.html`."""
        output.mkdir(parents=True, exist_ok=True)
        body = table(("data set", "size"), list(zip(self.sets, self.summaries, strict=True)))
        of_sets = [
            [each for each in figures if each is not None]
            for figures in zip(*(row.figures for row in self.rows), strict=True)
        ]
        body += answer_sections(arrange(of_sets), self.sets)
        body += paragraphs(self.notes)
        with complete_file(output / "comparison.html") as beside:
            beside.write_text(page("Comparison of data sets", body), encoding="utf-8", errors="replace")
        rows = [[None if each is None else each.as_json() for each in row.figures] for row in self.rows]
        content = {"sets": self.sets, "summaries": self.summaries, "rows": rows, "notes": self.notes}
        write_json(output / "comparison.json", content)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    values = [value.rjust(width) for value, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([cells[0].ljust(widths[0]), *values])


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
    of_sets = [{figure.title: figure for figure in figures_of(report)} for report in reports]
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
