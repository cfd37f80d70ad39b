"""When a sample changes from the empty context to its identity: one class per rule, one object per call.

Another rule is another file here with a subclass of `BoundaryRule`, and an entry in `RULES`: the pipeline's checks,
`uiface generate` and the demo ask there.
"""

from typing import Any

from .attention_at_rest import AttentionAtRest
from .fixed_timestep import FixedTimestep
from .rule import BoundaryRule, Observation
from .single_stage import SingleStage

__all__ = [
    "RULES",
    "AttentionAtRest",
    "BoundaryRule",
    "FixedTimestep",
    "Observation",
    "SingleStage",
    "rule_kind",
    "rule_of_layout",
]

# the order of messages, and of the demo's choices
RULES: tuple[type[BoundaryRule], ...] = (AttentionAtRest, FixedTimestep, SingleStage)


def rule_kind(boundary: Any) -> type[BoundaryRule]:
    """The class of `RULES` that the pipeline's argument `boundary` means.

    Raises:
        ValueError: none does.
    """
    for rule in RULES:
        if rule.accepts(boundary):
            return rule
    *others, last = [rule.written() for rule in RULES]
    raise ValueError(f"`boundary` has to be {', '.join(others)} or {last} but is {boundary!r}.")


def rule_of_layout(rule: BoundaryRule) -> FixedTimestep:
    """The rule of a call in which a picture takes the place of stage one: the boundary is where that is noised to.

    Raises:
        ValueError: a single stage has no boundary.
    """
    return FixedTimestep(
        rule.num_samples, rule.latest_boundary, rule.guide_from_boundary, timestep=rule.layout_timestep()
    )
