"""What an example model is, and where its inputs come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Draw:
    """Random inputs for ``batch`` samples, reproducible: floats are float32 and on the CPU; the
    batch axis comes first.
    """

    def __init__(self, batch: int, seed: int) -> None:
        self.batch = batch
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """[B, *shape] from the standard normal distribution."""
        return torch.randn(self.batch, *shape, generator=self._generator)

    def each(self, *shape: int) -> list[Tensor]:
        """The samples of ``normal(*shape)`` as a list, for models that take one tensor per
        sample.
        """
        return list(self.normal(*shape).unbind())

    def whole(self, high: int, *shape: int) -> Tensor:
        """[B, *shape] int64, uniform in [0, high)."""
        return torch.randint(0, high, (self.batch, *shape), generator=self._generator)

    def full(self, value: float, *shape: int) -> Tensor:
        """[B, *shape] of one value: float32 for a float, int64 for an int."""
        return torch.full(
            (self.batch, *shape),
            value,
            dtype=torch.float32 if isinstance(value, float) else torch.int64,
        )

    def mask(self, length: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """[B, length]: 1 for a token, 0 for padding at the end; the first prompt is two tokens
        shorter than the others.
        """
        mask = torch.ones(self.batch, length, dtype=dtype)
        mask[0, length - 2 :] = 0
        return mask


def grid(*sizes: int) -> Tensor:
    """The positions of a grid in row-major order: [number of positions, number of axes] float32."""
    return torch.cartesian_prod(
        *(torch.arange(size, dtype=torch.float32) for size in sizes)
    ).reshape(-1, len(sizes))


def rotary(positions: Tensor, channels: int, halves: bool = False) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, channels] for positions [N, axes]; a pair is two neighbouring channels,
    or one of each half.
    """
    axes = positions.shape[1]
    angles = (
        positions[:, :, None] * 100.0 ** -torch.linspace(0, 1, -(-channels // (2 * axes)))
    ).flatten(1)[:, : channels // 2]
    angles = angles.repeat(1, 2) if halves else angles.repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


HEADS: Mapping[str, Any] = {"num_attention_heads": 3, "attention_head_dim": 16}
"""The size of most tiny examples: 48 channels."""

Inputs = Callable[[Draw], dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """A model and one call of it: class name, constructor arguments, keyword arguments of
    ``forward``.

    ``latent`` and ``timestep`` name the keyword arguments that change from step to step. ``batch``
    is the usual number of samples in a call: 2 for one image with guidance.
    """

    model: str
    config: Mapping[str, Any]
    inputs: Inputs
    latent: str = "hidden_states"
    timestep: str = "timestep"
    batch: int = 2
