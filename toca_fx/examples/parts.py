"""The diffusers classes that the demo and the benchmark build, by what they are."""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import nn


def dit(**config: Any) -> nn.Module:
    """A class-conditional DiT; ``config`` as for ``DiTTransformer2DModel``."""
    model: nn.Module = DiTTransformer2DModel(**config)
    return model


def ddim(**config: Any) -> Any:
    """A scheduler for DDIM; ``config`` as for ``DDIMScheduler``."""
    return DDIMScheduler(**config)
