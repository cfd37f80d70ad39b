"""Where `models.CONDITIONS` meets the pipeline: their components, and the values of a call."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch

from .models import CONDITIONS, ConditionProjector

Function = TypeVar("Function", bound=Callable)
# name of the call's argument -> name of the component
ARGUMENTS = {projector.condition: component for component, projector in CONDITIONS.items()}


def with_arguments(annotations: Mapping[str, Any]) -> Callable[[Function], Function]:
    """Shows optional keyword arguments in the signature of a function that takes them as `**conditions`: diffusers and
    the command line read there what a pipeline is made of and called with."""

    def decorate(function: Function) -> Function:
        signature, kind = inspect.signature(function), inspect.Parameter.KEYWORD_ONLY
        parameters = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        parameters += [
            inspect.Parameter(name, kind, default=None, annotation=annotations[name]) for name in annotations
        ]
        cast(Any, function).__signature__ = signature.replace(parameters=parameters)
        function.__annotations__ |= annotations
        return function

    return decorate


def check_names(given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """
    Raises:
        TypeError: as of any function, for an argument that it does not have.
    """
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"got an unexpected keyword argument {unknown[0]!r}")


def condition_values(
    projectors: Mapping[str, ConditionProjector | None], given: Mapping[str, Any], batch_size: int
) -> dict[str, torch.Tensor]:
    """The values of a call for each component that there is, `(batch_size, fields)`, or `(1, fields)` if they are the
    same for all samples; NaN where none is given.

    Args:
        projectors: component -> projector, if the pipeline has it.
        given: argument -> values, see `ConditionProjector.parse`.

    Raises:
        TypeError: there is no such argument.
        ValueError: a value is wrong, or there is no component for it.
    """
    check_names(given, ARGUMENTS)
    for name, component in ARGUMENTS.items():
        if given.get(name) is not None and projectors.get(component) is None:
            raise ValueError(
                f"`{name}` needs a pipeline with a `{component}`, which this one does not have: leave it out, or add"
                f" one by training/train.py --init-from PIPELINE --{component.replace('_', '-')} '{{}}'."
            )
    found = {}
    for component, projector in projectors.items():
        if projector is not None:
            value, width = given.get(CONDITIONS[component].condition), len(CONDITIONS[component].fields)
            values = (
                torch.full((1, width), torch.nan) if value is None else CONDITIONS[component].parse(value, batch_size)
            )
            is_same = torch.isclose(values, values[:1], rtol=0, atol=0, equal_nan=True).all()
            found[component] = values[:1] if is_same else values
    return found


def with_conditions(
    contexts: torch.Tensor, projectors: Mapping[str, ConditionProjector | None], values: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Appends the tokens of all conditions to contexts.

    Args:
        contexts (`torch.Tensor` of shape `(n * B, own_tokens, context_dim)`): n per sample, one after the other for
            all samples; or any number, where the values are the same for all.
        projectors: component -> projector.
        values: component -> values `(B or 1, fields)`.
    """
    parts = [contexts]
    for component, given in values.items():
        projector = projectors[component]
        assert projector is not None, f"there are values for {component}"
        rows = given if len(given) == 1 else given.repeat(len(contexts) // len(given), 1)
        parts.append(projector.context_tokens(contexts, rows))
    return torch.cat(parts, dim=1) if len(parts) > 1 else contexts
