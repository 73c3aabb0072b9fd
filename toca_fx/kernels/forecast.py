"""The value of a unit that a step does not compute, of those at the last full steps."""

from __future__ import annotations

import torch
from torch import Tensor


def weights_dtype(values: torch.dtype) -> torch.dtype:
    """The dtype that values of another are weighed and summed in: float32 at least."""
    return torch.float64 if values == torch.float64 else torch.float32


def weighted_sum(weights: Tensor, *values: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_h weights[h] values[h] in ``dtype``; ``weights`` is [H], in ``weights_dtype`` of it."""
    total: Tensor | None = None
    for weight, value in zip(weights.unbind(), values, strict=True):
        term = weight * value.to(weights.dtype)
        total = term if total is None else total + term
    if total is None:
        raise ValueError("a history has one value at least")
    return total.to(dtype)
