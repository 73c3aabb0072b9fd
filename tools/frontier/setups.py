"""What is measured: a trained model, what it is asked for, its users' sampler, and others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from toca_fx.demo import digits
from tools import emoji
from tools.frontier import solvers

Denoiser: TypeAlias = Callable[..., tuple[Tensor, ...]]
Predict: TypeAlias = Callable[[Tensor, Tensor], Tensor]

STEPS = 50
FEWER = (8, 10, 12, 14, 16, 18, 20, 25, 33, STEPS)


@dataclass(frozen=True)
class Setup:
    """A model with its conditions.

    ``guided`` puts guidance around a denoiser: (images, timestep) -> prediction. ``shape`` is that
    of the images of one run. ``own`` is the users' sampler, by its name in ``samplers``, and
    ``converged`` the sampler and the steps of the run that stands for the exact solution.
    """

    name: str
    model: nn.Module
    guided: Callable[[Denoiser], Predict]
    shape: tuple[int, ...]
    samplers: Mapping[str, solvers.Sampler]
    own: str
    converged: tuple[str, int]

    @property
    def baselines(self) -> list[str]:
        """The points without a policy: each sampler, with fewer and fewer steps."""
        return [f"{sampler}:{steps}" for sampler in self.samplers for steps in FEWER]

    @cached_property
    def weights(self) -> str:
        """A digest of the weights."""
        found = hashlib.sha256()
        for value in self.model.state_dict().values():
            found.update(value.contiguous().numpy().tobytes())
        return found.hexdigest()[:12]

    @torch.no_grad()
    def sample(self, denoiser: Denoiser, scheduler: Any, *, seed: int) -> Tensor:
        """Images [samples, channels, height, width] in [-1, 1], from the noise of ``seed``."""
        predict = self.guided(denoiser)
        images = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))
        for timestep in scheduler.timesteps:
            images = scheduler.step(predict(images, timestep), timestep, images).prev_sample
        return images.clamp(-1, 1)


def digits_setup(samples: int, guidance: float = 2.0) -> Setup:
    """Digits, as ``toca-fx demo`` draws them: as many of each class.

    Raises:
        ValueError: ``samples`` is not a multiple of ten.
    """
    if samples % 10:
        raise ValueError(f"--samples {samples}: expected a multiple of 10, as many of each class")
    classes = torch.arange(10).repeat_interleave(samples // 10)
    return Setup(
        name="digits",
        model=digits.load_denoiser(),
        guided=partial(guided_digits, classes=classes, guidance=guidance),
        shape=(samples, 1, digits.SIZE, digits.SIZE),
        samplers=solvers.of_digits(),
        own="ddim",
        converged=("ddim", 500),
    )


def guided_digits(denoiser: Denoiser, classes: Tensor, guidance: float) -> Predict:
    """The prediction under guidance, with the conditional half first, as ``digits.sample`` does."""
    labels = torch.cat([classes, torch.full_like(classes, digits.NULL_CLASS)])

    def predict(images: Tensor, timestep: Tensor) -> Tensor:
        both = denoiser(
            torch.cat([images, images]),
            timestep=timestep.expand(len(labels)),
            class_labels=labels,
            return_dict=False,
        )[0]
        conditional, unconditional = both.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return predict


def emoji_setup(samples: int, folder: Path) -> Setup:
    """Emoji, of the first ``samples`` prompts; ``folder`` has the weights.

    Raises:
        ValueError: there are fewer prompts.
        OSError: there are no weights.
    """
    if samples > len(emoji.PROMPTS):
        raise ValueError(f"--samples {samples}: there are {len(emoji.PROMPTS)} prompts")
    return Setup(
        name="emoji",
        model=emoji.load_denoiser(folder),
        guided=partial(emoji.guided, prompts=emoji.PROMPTS[:samples]),
        shape=(samples, 3, emoji.SIZE, emoji.SIZE),
        samplers=solvers.of_emoji(),
        own="euler",
        converged=("ab2", 300),
    )


def setup_of(model: str, samples: int | None, weights: Path | None) -> Setup:
    """The setup of "digits" or "emoji", of 40 digits or 16 emoji unless said otherwise.

    Raises:
        ValueError: no such ``samples``, or the emoji model without its ``weights``.
        OSError: there are no weights.
    """
    if model == "digits":
        return digits_setup(samples or 40)
    if weights is None:
        raise ValueError("emoji: --weights is needed, the folder of the model's weights")
    return emoji_setup(samples or 16, weights)
