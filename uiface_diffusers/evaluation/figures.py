"""Figures of data sets: values with their names, their conditions, and what they say."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple


class Question(Enum):
    """What a reader of a report wants to know, in the order of the report, and what an answer needs."""

    ONE_PERSON = ("Is an identity one person?", "")
    DISTINCT = ("Are people distinct?", "")
    DIVERSE = ("Is it diverse?", "")
    REAL = ("Does it look real?", "real faces (--real)")
    LEAK = ("Does it leak?", "embeddings of real people (--against)")
    OTHER = ("Other figures", "")

    def __init__(self, text: str, needs: str):
        self.text, self.needs = text, needs


class Description(NamedTuple):
    """What a figure says. The first three are part of `report.json`.

    Args:
        label (`str`): its name in reports.
        unit (`str`): `"%"` for a share, shown in hundredths; `"x 1000"`, shown in thousandths; or none.
        meaning (`str`): one or two sentences, also on whether more is better.
        question: that it answers.
        real (`str`): name of the figure with the value of real faces, which is shown beside it; if any.
        headline (`bool`): the first to look at for an answer.
    """

    label: str
    unit: str
    meaning: str
    question: Question = Question.OTHER
    real: str = ""
    headline: bool = False


@dataclass
class Figure:
    """One figure of a data set.

    Args:
        name (`str`): of the figure; `kid/alexnet` if several networks give it.
        value (`float`, *optional*): None if it is not finite.
        description: what it says.
        conditions (`dict`): how it was measured. Figures of two sets can be compared when these are equal.
        detail (`str`): what else a reader has to know, such as the number of pairs.
    """

    name: str
    value: float | None
    description: Description
    conditions: dict[str, Any] = field(default_factory=dict)
    detail: str = ""

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            self.value = None

    @property
    def kind(self) -> str:
        """The name without a network."""
        return self.name.partition("/")[0]

    @property
    def label(self) -> str:
        network = self.name.partition("/")[2]
        return self.description.label + (f" by {network}" if network else "")

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
        if self.description.unit == "x 1000":
            return f"{1000 * self.value:.1f} / 1000"
        return f"{100 * self.value:.2f} %" if self.description.unit == "%" else f"{self.value:.4f}"

    @property
    def meaning(self) -> str:
        return " ".join([self.description.meaning, self.detail]).strip()

    def as_json(self) -> dict[str, Any]:
        """For `report.json`, which can be read without this package."""
        unit, meaning = self.description.unit, self.description.meaning
        described = {"label": self.label, "unit": unit, "meaning": meaning, "detail": self.detail}
        return {"name": self.name, "value": self.value, "conditions": self.conditions, **described}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Figure":
        """What `as_json` gave.

        Raises:
            KeyError, TypeError, ValueError: the content is no figure.
        """
        name, value = str(content["name"]), content["value"]
        label, unit, meaning = (str(content[part]) for part in ("label", "unit", "meaning"))
        description = Description(label.removesuffix(f" by {name.partition('/')[2]}"), unit, meaning)
        conditions, detail = dict(content["conditions"]), str(content.get("detail", ""))
        return cls(name, None if value is None else float(value), description, conditions, detail)
