"""Random sequences of what users do: none may give a wrong image, and nearly all may be cached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from tests.system.runtime.driver.events import Sequence, sequences
from tests.system.runtime.driver.world import World

WORLDS: dict[str, dict[str, Any]] = {
    "labels": {"N": {"base": 3}},
    "text": {"N": {"base": 3, "drift": 0.4}},
}


def drive(world: World, examples: int, shrinks: bool = True) -> None:
    phases = [Phase.generate, Phase.shrink] if shrinks else [Phase.generate]

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(sequences())
    def play(sequence: Sequence) -> None:
        world.play(sequence)

    play()


@pytest.fixture(autouse=True)
def _many_captures() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=512):
        yield


@pytest.mark.parametrize("kind", WORLDS)
def test_no_wrong_image(kind: str) -> None:
    world = World(kind, **WORLDS[kind])
    drive(world, 50)
    print(world.figures)
    assert world.figures.share >= 0.95, str(world.figures)
