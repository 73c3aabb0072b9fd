"""What a case is: a pipeline of tiny random components, and one call of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Change = Callable[[Any], Mapping[str, Any] | None]
"""What is done to a pipeline; what it returns is given to the calls behind it."""


@dataclass(frozen=True)
class Case:
    """A pipeline and one call.

    ``build`` makes the pipeline on the CPU, in float32 and in eval mode, without a progress bar;
    two builds have equal weights. ``inputs`` makes the keyword arguments of one call, all but the
    number of steps, whose name is ``steps``, and ``generator``. After the first image and each
    further one comes one of the ``changes``. ``options`` are those of ``toca_fx.compile``, under
    which full steps may be ``tolerance`` off (absolute): other compilers round otherwise.
    ``known`` is why it is not right, where that is known.
    """

    name: str
    build: Callable[[], Any]
    inputs: Callable[[Any], dict[str, Any]]
    steps: str = "num_inference_steps"
    changes: Sequence[Change] = ()
    options: Mapping[str, Any] = field(default_factory=lambda: {"inner": "eager"})
    tolerance: float = 0.0
    known: str = ""

    def call(self, pipe: Any, steps: int = 12, **more: Any) -> Any:
        """What one call of the pipeline returns, all random numbers drawn from the seed 0.

        A few pipelines draw from torch's own generator too (SD3's ControlNet, in its VAE).
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(0)
            inputs = {**self.inputs(pipe), self.steps: steps, **more}
            return pipe(**inputs, generator=generator)
