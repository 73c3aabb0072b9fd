"""What is benchmarked: the paper's models at their real width, tokens and batch.

They have as many blocks as a small machine stands, or all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from toca_fx.examples import Example

Blocks = int | Literal["all"] | None


@dataclass(frozen=True)
class Case:
    """A preset of ``toca_fx.examples``, with the policy and number of steps that it is run with.

    ``config`` is what is changed of it for a small machine.
    """

    preset: str
    policy: str
    steps: int
    config: Mapping[str, int]


CASES = {
    "dit-xl-2": Case("dit-xl-2-256", "dit-xl-2", 50, {"num_layers": 4}),
    "dit-xl-2-512": Case("dit-xl-2-512", "dit-xl-2", 50, {"num_layers": 2}),
    "pixart-alpha": Case("pixart-alpha-256", "pixart-alpha", 20, {"num_layers": 4}),
    "pixart-alpha-1024": Case("pixart-alpha-1024", "pixart-alpha", 20, {"num_layers": 1}),
    "latte": Case("latte-256", "opensora", 30, {"num_layers": 1}),
    "flux-dev": Case("flux-dev-512", "flux-dev", 12, {"num_layers": 1, "num_single_layers": 1}),
    "flux-dev-1024": Case(
        "flux-dev-1024", "flux-dev", 50, {"num_layers": 1, "num_single_layers": 1}
    ),
    "flux-768": Case("flux-768", "flux-dev", 50, {"num_layers": 3, "num_single_layers": 6}),
    "wan-1.3b": Case("wan-1.3b-480p", "default-video", 50, {"num_layers": 1}),
}
"""Latte stands for Open-Sora, which diffusers does not have: spatial and temporal blocks, a
caption, 4096 tokens.
"""


def example_of(case: Case, blocks: Blocks) -> Example:
    """The model of a case, with ``blocks`` of each kind.

    "all" are as many as in its preset, None as many as a small machine stands.
    """
    from toca_fx.examples import PRESETS

    example = PRESETS[case.preset]
    if blocks == "all":
        return example
    numbers = {key: blocks or number for key, number in case.config.items()}
    return replace(example, config={**example.config, **numbers})
