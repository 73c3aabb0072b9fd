"""What the cases are made of: pipelines, transformers, random tensors and pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import diffusers
import torch
from PIL import Image
from torch import Tensor, nn

from toca_fx.examples import Example, build, examples

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


def model(name: str, *, seed: int = 0, **config: Any) -> nn.Module:
    """A model of diffusers whose weights leave nothing degenerate.

    (Those that diffusers draws close many gates and outputs by zeros.)
    """
    return build(Example(name, config, lambda _: {}), seed=seed)[0]


def transformer(name: str, *, seed: int = 0, **config: Any) -> nn.Module:
    """The tiny example of a transformer class; ``config`` changes what the example says."""
    return model(name, seed=seed, **{**examples()[name].config, **config})


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


def prompts(tokens: int = 12, width: int = 24) -> dict[str, Tensor]:
    """The embeddings of a prompt and of a negative one: [1, tokens, width] each."""
    return {
        "prompt_embeds": normal(1, tokens, width),
        "negative_prompt_embeds": normal(1, tokens, width, seed=1),
    }


def masks(
    tokens: int = 12, dtype: torch.dtype = torch.long, name: str = "prompt_attention_mask"
) -> dict[str, Tensor]:
    """Their masks [1, tokens]: the last two tokens of the prompt are padding."""
    mask = torch.ones(1, tokens, dtype=dtype)
    mask[:, -2:] = 0
    return {name: mask, f"negative_{name}": torch.ones_like(mask)}


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    """A random picture in RGB."""
    noise = torch.randint(
        256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return Image.fromarray(noise.numpy())


def clip(frames: int = 9, width: int = 64, height: int = 64, seed: int = 0) -> list[Image.Image]:
    """A video of random pictures."""
    return [picture(width, height, seed * frames + frame) for frame in range(frames)]


def left_half(width: int = 32, height: int = 32) -> Image.Image:
    """A mask: white (to be painted) on the left, black on the right."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width // 2, height))
    return mask
