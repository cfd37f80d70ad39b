"""Figures arranged as answers: the questions in their order, one row per figure, the networks that measured it as
columns."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import registry
from .figures import Description, Figure, Question

# conditions that tell networks from each other; all others tell rows from each other
NETWORK = ("recognizer", "features", "network", "weights")


@dataclass
class Row:
    """A figure with the same conditions in all networks and sets.

    Args:
        label (`str`): the figure's.
        conditions (`str`): those by which the rows of the figure differ; empty if it has a single row.
        headline (`bool`): the first to look at.
        figures: network -> one figure per set; None where a set has none.
        real: the same for the values of real faces.
    """

    label: str
    conditions: str
    headline: bool
    figures: dict[str, list[Figure | None]]
    real: dict[str, list[Figure | None]]

    def text(self, network: str, position: int = 0) -> str:
        """The value of a set by a network; empty if there is none."""
        figure = self.figures[network][position] if network in self.figures else None
        return "" if figure is None else figure.text

    def real_text(self, network: str, position: int = 0) -> str:
        """The same for real faces."""
        figure = self.real[network][position] if network in self.real else None
        return "" if figure is None else figure.text

    @property
    def line(self) -> str:
        """The values of a single set, for a terminal."""
        parts = []
        for network in self.figures:
            real = self.real_text(network)
            value = self.text(network) + (f" (real faces {real})" if real else "")
            parts.append(f"{value} by {network}" if network else value)
        return f"{', '.join(filter(None, [self.label, self.conditions]))}: {', '.join(parts)}"


@dataclass
class Answer:
    """The rows that answer one question."""

    question: Question
    rows: list[Row]

    @property
    def networks(self) -> list[str]:
        return list(dict.fromkeys(network for row in self.rows for network in row.figures))

    @property
    def line(self) -> str:
        """The headlines of a single set in one line, for a terminal."""
        if not self.rows:
            return f"{self.question.text} Not measured: it needs {self.question.needs}."
        rows = [row for row in self.rows if row.headline] or self.rows[:1]
        return f"{self.question.text} {'; '.join(row.line for row in rows)}"


def described(figure: Figure) -> Figure:
    """A figure of a report with the question that it answers: reports do not say it, the measures do."""
    known = {kind: each for measure in registry.MEASURES for kind, each in measure.figures.items()}
    ours = known.get(figure.kind)
    if ours is None:
        return figure
    label, unit, meaning = figure.description[:3]
    return replace(figure, description=Description(label, unit, meaning, *ours[3:]))


def arrange(of_sets: Sequence[Sequence[Figure]]) -> list[Answer]:
    """The figures of one data set, or of several, as answers. A question without figures is there if it says what it
    needs."""
    of_sets = [[described(figure) for figure in figures] for figures in of_sets]
    titles = _network_titles(of_sets)
    counterparts = {figure.description.real for figures in of_sets for figure in figures} - {""}
    rows: dict[tuple, Row] = {}
    others: dict[str, list[dict[str, Any]]] = {}
    for position, figures in enumerate(of_sets):
        real = {_key(figure.kind, figure): figure for figure in figures if figure.kind in counterparts}
        for figure in figures:
            if figure.kind not in counterparts:
                network, conditions = titles[_network(figure)], _other_conditions(figure)
                key = (figure.kind, *map(str, conditions.items()))
                if key not in rows:
                    rows[key] = Row(figure.description.label, "", figure.description.headline, {}, {})
                    others.setdefault(figure.kind, []).append(conditions)
                empty: list[Figure | None] = [None] * len(of_sets)
                rows[key].figures.setdefault(network, [*empty])[position] = figure
                beside = real.get(_key(figure.description.real, figure))
                if beside is not None:
                    rows[key].real.setdefault(network, [*empty])[position] = beside
    answers = {question: Answer(question, []) for question in Question}
    for row in rows.values():
        first = _first(row)
        row.conditions = ", ".join(_differing(_other_conditions(first), others[first.kind]))
        answers[first.description.question].rows.append(row)
    order = list(dict.fromkeys(kind for measure in registry.MEASURES for kind in measure.figures))
    for answer in answers.values():
        # headlines first, figures of other versions last
        kinds = {id(row): _first(row).kind for row in answer.rows}
        answer.rows.sort(key=lambda row: (not row.headline, [*order, kinds[id(row)]].index(kinds[id(row)])))
    return [answer for answer in answers.values() if answer.rows or answer.question.needs]


def _first(row: Row) -> Figure:
    return next(figure for figures in row.figures.values() for figure in figures if figure is not None)


def _key(kind: str, figure: Figure) -> tuple[str, ...]:
    """Of a figure with the conditions of another one."""
    return (kind, figure.name.partition("/")[2], *map(str, figure.conditions.items()))


def _other_conditions(figure: Figure) -> dict[str, Any]:
    return {name: value for name, value in figure.conditions.items() if name not in NETWORK}


def _differing(conditions: dict[str, Any], others: Sequence[dict[str, Any]]) -> list[str]:
    """The conditions of a row that not all rows of its figure have, in words."""
    return [f"{name} {value}" for name, value in conditions.items() if any(each.get(name) != value for each in others)]


def _network(figure: Figure) -> tuple[str, str]:
    """Name and weights of the network that measured; empty if there is none."""
    conditions = figure.conditions
    given = [conditions.get(name) for name in ("recognizer", "features", "network")]
    name = figure.name.partition("/")[2] or next((str(each) for each in given if each is not None), "")
    return name, str(conditions.get("weights", ""))


def _network_titles(of_sets: Sequence[Sequence[Figure]]) -> dict[tuple[str, str], str]:
    """What a network is called: its name, with its layers and weights where the name does not tell."""
    networks = list(dict.fromkeys(_network(figure) for figures in of_sets for figure in figures))
    # networks other than recognizers have these in their names: `alex 2b566cc3a4d6`, `LPIPS alex, layers 2, 3, ...`
    short = [re.split(r",| [0-9a-f]{8,}$", name)[0] for name, _ in networks]
    return {
        network: title if short.count(title) == 1 else " ".join(filter(None, network))
        for network, title in zip(networks, short, strict=True)
    }
