"""What a case is: a pipeline of tiny random components, and one call of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """A pipeline and one call.

    ``build`` makes the pipeline on the CPU, in float32 and in eval mode, without a progress bar;
    two builds have equal weights. ``inputs`` makes the keyword arguments of one call, all but the
    number of steps, whose name is ``steps``, and ``generator``.
    """

    name: str
    build: Callable[[], Any]
    inputs: Callable[[Any], dict[str, Any]]
    steps: str = "num_inference_steps"

    def call(self, pipe: Any, steps: int = 12) -> Any:
        """What one call of the pipeline returns, all random numbers drawn from the seed 0.

        A few pipelines draw from torch's own generator too (SD3's ControlNet, in its VAE).
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(0)
            return pipe(**self.inputs(pipe), **{self.steps: steps}, generator=generator)
