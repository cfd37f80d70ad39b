import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.utils import BaseOutput


@dataclass
class ConditionProjectorOutput(BaseOutput):
    """
    Args:
        tokens (`torch.Tensor` of shape `(batch_size, num_tokens, context_dim)`): what the context's own tokens are
            changed by to become the condition's.
    """

    tokens: torch.Tensor


class ConditionProjector(ModelMixin, ConfigMixin):
    """What a condition beside the identity has to be: a value per sample becomes context tokens, which are appended to
    the empty context and to the identity's alike. Stage one then obeys the condition, and stage two keeps it.

    A subclass has `context_dim` and `num_tokens` in its configuration, the latter a multiple of the context's own. It
    defines `forward`, `mirrored`, `from_columns`, and the names below. An entry in `models.CONDITIONS` registers it:
    then pipelines take it as the optional component `NAME_projector` and its value as the argument `NAME` of their
    call, `training/train.py` has `--NAME-projector` and `--NAME-dropout`, `uiface generate` has `--NAME-distribution`.

    Attributes:
        condition (`str`): NAME.
        fields (`tuple[str, ...]`): the numbers of a value, by their columns in the metadata of a data set.
        columns (`tuple[str, ...]`): the columns of a cache of faces that the numbers are computed from.
        limits (`tuple[float, float]`): from and to, of every number.
        remedy (`str`): how a cache that lacks the columns gets them.
    """

    condition: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    columns: ClassVar[tuple[str, ...]]
    limits: ClassVar[tuple[float, float]]
    remedy: ClassVar[str]

    def forward(
        self, values: torch.Tensor, return_dict: bool = True
    ) -> ConditionProjectorOutput | tuple[torch.Tensor]:
        """
        Args:
            values (`torch.Tensor` of shape `(batch_size, len(fields))`): NaN in a row whose value is not given: its
                tokens are learned ones.
            return_dict (`bool`, defaults to `True`): a plain tuple when `False`.

        Returns:
            `ConditionProjectorOutput` with `tokens` of shape `(batch_size, num_tokens, context_dim)`.
        """
        raise NotImplementedError

    @staticmethod
    def mirrored(values: torch.Tensor) -> torch.Tensor:
        """The values of the mirrored pictures, of the same shape."""
        raise NotImplementedError

    @staticmethod
    def from_columns(columns: np.ndarray) -> np.ndarray:
        """The values of faces, `(N, len(fields))`, from their `columns` in a cache, `(N, len(columns))`. NaN where
        they are not known."""
        raise NotImplementedError

    def context_tokens(self, contexts: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The tokens to append to contexts: their own, changed by `forward`.

        A projector whose output is zero, as that of a fresh one, appends copies. Every key of the attention is then
        there as often, with its value: softmax, group norms and covariances are what they are without the copies, and
        a trained denoiser predicts what it did.

        Args:
            contexts (`torch.Tensor` of shape `(batch, own_tokens, context_dim)`): the empty ones or the identities'.
            values (`torch.Tensor` of shape `(batch or 1, len(fields))`): see `forward`.

        Returns:
            `torch.Tensor` of shape `(batch, num_tokens, context_dim)`.
        """
        copies = contexts.repeat(1, self.config.num_tokens // contexts.shape[1], 1)
        return copies + self(values, return_dict=False)[0].to(contexts)

    @classmethod
    def parse(cls, given: Any, batch_size: int) -> torch.Tensor:
        """Brings the values of a call into one form, `(batch_size or 1, len(fields))`, float32, on the CPU.

        Args:
            given: one value for all samples, or one per sample as a list or a tensor. `None` in a list, and a row of
                NaN, is a sample that has none.

        Raises:
            ValueError: another shape or number of values, or numbers that are not finite or not within `limits`.
        """
        width, (low, high) = len(cls.fields), cls.limits
        try:
            rows = given
            if isinstance(given, list | tuple):
                rows = np.array([[math.nan] * width if each is None else each for each in given], np.float32)
            values = torch.as_tensor(rows, dtype=torch.float32, device="cpu").detach()
        except (TypeError, ValueError, RuntimeError):
            values = torch.empty(0)
        values = values[None] if values.ndim == 1 else values
        if values.shape not in ((1, width), (batch_size, width)):
            raise ValueError(
                f"`{cls.condition}` has to be ({', '.join(cls.fields)}), or one such value per sample, {batch_size} of"
                f" them, but is {given!r}."
            )
        is_given = ~values.isnan().all(dim=1, keepdim=True)
        if (is_given & ~((values >= low) & (values <= high))).any():
            raise ValueError(
                f"`{cls.condition}` has to be finite numbers from {low:g} to {high:g} ({', '.join(cls.fields)}) but is"
                f" {values.tolist()}."
            )
        return values
