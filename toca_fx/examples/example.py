"""What an example model is, and where its inputs come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Draw:
    """Random inputs for ``batch`` samples, reproducible.

    Tensors are on the CPU, floats are float32, and the batch axis comes first.
    """

    def __init__(self, batch: int, seed: int) -> None:
        self.batch = batch
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Samples of the standard normal distribution: [B, *shape]."""
        return torch.randn(self.batch, *shape, generator=self._generator)

    def each(self, *shape: int) -> list[Tensor]:
        """B tensors [*shape], for models that take one tensor per sample."""
        return list(self.normal(*shape).unbind())

    def whole(self, high: int, *shape: int) -> Tensor:
        """Integers that are uniform in [0, high): [B, *shape] int64."""
        return torch.randint(0, high, (self.batch, *shape), generator=self._generator)

    def full(self, value: float, *shape: int) -> Tensor:
        """One value everywhere: [B, *shape], float32 for a float and int64 for an int."""
        return torch.full(
            (self.batch, *shape),
            value,
            dtype=torch.float32 if isinstance(value, float) else torch.int64,
        )

    def mask(self, length: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """A mask of text tokens: [B, length], 1 for a token and 0 for padding at the end.

        The first prompt is two tokens shorter than the others.
        """
        mask = torch.ones(self.batch, length, dtype=dtype)
        mask[0, length - 2 :] = 0
        return mask


def grid(*sizes: int) -> Tensor:
    """The positions of a grid in row-major order: [number of positions, number of axes] float32."""
    axes = (torch.arange(size, dtype=torch.float32) for size in sizes)
    return torch.cartesian_prod(*axes).reshape(-1, len(sizes))


def rotary(positions: Tensor, channels: int, halves: bool = False) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, channels] of rotary embeddings at positions [N, axes].

    A pair is two neighbouring channels, or with ``halves`` one channel of each half.
    """
    axes = positions.shape[1]
    frequencies = 100.0 ** -torch.linspace(0, 1, -(-channels // (2 * axes)))
    angles = (positions[:, :, None] * frequencies).flatten(1)[:, : channels // 2]
    angles = angles.repeat(1, 2) if halves else angles.repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def text_to_video(d: Draw, time: float = 500, channels: int = 4) -> dict[str, Any]:
    """Latents of 3 frames of 8 x 12, which are 3 x 24 tokens, 12 text tokens and a timestep."""
    return {
        "hidden_states": d.normal(channels, 3, 8, 12),
        "encoder_hidden_states": d.normal(12, 24),
        "timestep": d.full(time),
    }


HEADS: Mapping[str, Any] = {"num_attention_heads": 3, "attention_head_dim": 16}
"""The size of most tiny examples: 48 channels."""

Inputs = Callable[[Draw], dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """A model and one call of it.

    ``model`` is the class name, ``config`` the arguments of the constructor, ``inputs`` makes the
    keyword arguments of ``forward``; ``latent`` and ``timestep`` name those that change from step
    to step, ``other_latents`` and ``other_timesteps`` more of them. ``batch`` is the usual number
    of samples in a call: 2 for one image with guidance.
    """

    model: str
    config: Mapping[str, Any]
    inputs: Inputs
    latent: str = "hidden_states"
    timestep: str = "timestep"
    other_latents: tuple[str, ...] = ()
    other_timesteps: tuple[str, ...] = ()
    batch: int = 2

    @property
    def latents(self) -> tuple[str, ...]:
        """The names of all latents."""
        return self.latent, *self.other_latents

    @property
    def timesteps(self) -> tuple[str, ...]:
        """The names of all timesteps, first the one that tells steps apart."""
        return self.timestep, *self.other_timesteps
