"""What the cases are made of: pipelines, transformers, random tensors and pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import diffusers
import torch
from PIL import Image
from torch import Tensor, nn

from toca_fx.examples import build, examples

T = TypeVar("T")


def pipeline(name: str, **components: Any) -> Any:
    """The pipeline of a class of diffusers, its progress bar off.

    Components that are not given and have no default are None: text encoders and tokenizers, where
    a call is given embeddings.
    """
    cls = getattr(diffusers, name)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    absent = {p.name: None for p in parameters if p.default is inspect.Parameter.empty}
    pipe = cls(**{**absent, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def transformer(name: str, *, seed: int = 0, **config: Any) -> nn.Module:
    """The tiny example of a transformer class; ``config`` changes what the example says.

    Its weights leave nothing degenerate (diffusers' own initialise many gates and outputs to zero).
    """
    example = examples()[name]
    return build(replace(example, config={**example.config, **config}), seed=seed)[0]


def seeded(make: Callable[[], T], seed: int = 0) -> T:
    """What ``make`` returns, a module or not, its random numbers drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = make()
    if isinstance(made, nn.Module):
        made.eval().requires_grad_(False)
    return made


def normal(*shape: int, seed: int = 0) -> Tensor:
    """A sample of the standard normal distribution: [*shape] float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    """A random picture in RGB."""
    noise = torch.randint(
        256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return Image.fromarray(noise.numpy())


def left_half(width: int = 32, height: int = 32) -> Image.Image:
    """A mask: white (to be painted) on the left, black on the right."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width // 2, height))
    return mask
