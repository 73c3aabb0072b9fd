"""The emoji model: text to image by words, 64 x 64, rectified flow, guidance 4.

Its weights are not in the repository: tools take the folder that has them (``emoji.json`` with the
configuration, ``emoji_a.safetensors`` and ``emoji_b.safetensors`` with the two halves of the
weights). The denoiser is the ordinary PixArt transformer of diffusers in pixel space: x at sigma is
(1 - sigma) image + sigma noise, the model says noise - image, and its timestep is 1000 sigma.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from safetensors.torch import load_file
from torch import Tensor, nn

SIZE = 64
WORD = 128
GUIDANCE = 4.0
PROMPTS = (
    *("red apple", "blue apple", "green apple", "cat", "cat face hat", "sleepy cat"),
    *("smiling face sunglasses", "heart", "blue heart", "rocket", "pizza", "burger", "tree"),
    *("christmas tree", "dog", "robot"),
)
"""What is measured: calibrate on others."""


def load_denoiser(folder: Path) -> nn.Module:
    """The denoiser in float32, in evaluation mode. Raises OSError for a folder without it."""
    config = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))["config"]
    model: nn.Module = PixArtTransformer2DModel(**config)
    halves = (load_file(folder / f"emoji_{half}.safetensors") for half in "ab")
    model.load_state_dict({key: value.float() for half in halves for key, value in half.items()})
    return model.eval()


def word(text: str) -> Tensor:
    """The token [128] of a word: a direction that its hash draws."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    drawn = np.random.default_rng(seed).standard_normal(WORD)
    return torch.from_numpy((drawn / np.linalg.norm(drawn) * math.sqrt(WORD)).astype(np.float32))


def captions(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens [2B, L, 128] and masks [2B, L] of prompts, the B unconditional ones first.

    The first token of each is that of the empty word; an unconditional caption has no other.
    """
    words = [["", *prompt.split()] for prompt in prompts]
    length = max(map(len, words))
    tokens = torch.stack(
        [torch.stack([word(text) for text in (row + [""] * length)[:length]]) for row in words]
    )
    places = torch.arange(length)
    asked = torch.stack([places < len(row) for row in words])
    return torch.cat([tokens, tokens]), torch.cat([(places < 1).expand_as(asked), asked])


def guided(
    denoiser: Callable[..., tuple[Tensor, ...]], prompts: Sequence[str]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The velocity under classifier-free guidance: images [B, 3, 64, 64], timestep -> [B, ...].

    Both halves go through the denoiser as one batch of 2B rows, the unconditional ones first.
    """
    tokens, mask = captions(prompts)

    def velocity(images: Tensor, timestep: Tensor) -> Tensor:
        both = denoiser(
            torch.cat([images, images]),
            encoder_hidden_states=tokens,
            timestep=timestep.expand(len(tokens)),
            encoder_attention_mask=mask,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        unconditional, conditional = both.chunk(2)
        return unconditional + GUIDANCE * (conditional - unconditional)

    return velocity


def even(steps: int) -> list[float]:
    """The timesteps of ``steps`` equal steps from noise to image."""
    return [1000 * (1 - step / steps) for step in range(steps)]


class AdamsBashforth:
    """The multistep solver of dx/dsigma = v, as a scheduler of diffusers; order 1 is Euler.

    ``timesteps`` fall from 1000; the last step goes to 0.
    """

    def __init__(self, timesteps: Sequence[float], order: int) -> None:
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32)
        sigmas = [timestep / 1000 for timestep in (*timesteps, 0.0)]
        self._strides = [after - before for before, after in pairwise(sigmas)]
        self._order, self._at, self._last = order, 0, torch.empty(0)

    def step(self, velocity: Tensor, timestep: Tensor, images: Tensor) -> SchedulerOutput:
        """The images [B, ...] at the next timestep, in ``prev_sample``."""
        at, stride = self._at, self._strides[self._at]
        mean = velocity
        if self._order == 2 and at:  # the line through the last two velocities
            mean = velocity + stride / (2 * self._strides[at - 1]) * (velocity - self._last)
        self._at, self._last = at + 1, velocity
        return SchedulerOutput(prev_sample=images + stride * mean)
