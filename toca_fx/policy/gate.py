"""Whether a step is full, decided as the steps come: by how much has changed since the last one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from toca_fx.policy.keys import key

Signal: TypeAlias = Literal["easycache", "first_block", "sea", "surprise"]


@dataclass(frozen=True)
class Gate:
    """A step that `N` does not force to be full is so once the signal reaches the threshold.

    `at_most` steps in a row are not full. None: what `N.base` says, or any number.
    """

    signal: Signal = field(
        metadata=key(
            "What is measured. `easycache`: how much the model's output changes, guessed from how "
            "much its latents do and from the ratio of both over the last two full steps; the sum "
            "over the steps since the last full one (EasyCache). `first_block`: how far what the "
            "first block adds to the residual stream is from what it added at the last full step "
            "(First Block Cache); that block is run ahead of every step. `sea`: how much the "
            "latents change once each of their frequencies is weighed by its signal in the noise, "
            "in sum (SeaCache); needs `sampler.noise`. `surprise`: how far the last full step was "
            "from its forecast, e after d0 steps, is e (d / d0)^(order + 1) after d steps; needs a "
            "memory of the model (`cache.grain: model` or `output`, or `skip`) and a `forecast` of "
            "order 1 or more. All are relative changes, of the row that changes most.",
            examples=("easycache",),
            stand_in="easycache",
        )
    )
    threshold: float = field(
        metadata=key(
            "The value of the signal from which on a step is full. 0.1 is a tenth of what is "
            "measured.",
            exclusive_minimum=0,
            maximum=1000,
            examples=(0.05,),
            stand_in=1.0,
        )
    )
    at_most: int | None = field(
        default=None,
        metadata=key(
            "How many steps in a row are not full at most, whatever the signal says. Default: "
            "`N.base` - 1; any number where `N.full_steps` lists full steps.",
            minimum=1,
            maximum=1000,
            examples=(6,),
        ),
    )

    @property
    def probes(self) -> bool:
        """Whether the first block is run ahead of every step."""
        return self.signal == "first_block"
