"""Random sequences of what users do: none may give a wrong image, and nearly all may be cached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

import toca_fx.backend
import toca_fx.runtime.generations
from tests.marks import slow_but
from tests.system.runtime.driver.events import Sampling, Sequence, sequences
from tests.system.runtime.driver.oracle import WrongImageError
from tests.system.runtime.driver.world import World
from toca_fx.runtime.clock import Progress
from toca_fx.runtime.context import Place, current_session
from toca_fx.runtime.generations import Generations
from toca_fx.runtime.identity import Seen
from toca_fx.runtime.storage import Storage

LINE = {"basis": "newton", "order": 1}
SKIPS: dict[str, Any] = {"cache": {"grain": "output"}, "forecast": LINE}


def gated(signal: str, threshold: float, **sections: Any) -> dict[str, Any]:
    return {"N": {"base": 4}, "gate": {"signal": signal, "threshold": threshold}, **sections}


# By name the model's kind of prompt, and the policy. Latents are drawn anew at every step, so that
# all signals of gates are about 1 a step: of the thresholds some steps are above, some below.
WORLDS: dict[str, tuple[str, dict[str, Any]]] = {
    "labels": ("labels", {"N": {"base": 3}}),
    "text": ("text", {"N": {"base": 3, "drift": 0.4}}),
    "forecasts": (
        "labels",
        {"N": {"base": 2}, "cache": {"grain": "output"}, "forecast": {**LINE, "order": 2}},
    ),
    "skips": ("text", {"N": {"base": 3}, "skip": "alternate", "forecast": LINE}),
    "easycache": ("text", gated("easycache", 1.5, cache={"grain": "model"}, forecast=LINE)),
    "sea": ("text", gated("sea", 2, sampler={"steps": 6, "noise": "linear"})),
    "surprise": ("labels", gated("surprise", 1.5, **SKIPS)),
    "first block": ("labels", gated("first_block", 1.5, **SKIPS)),
}
ROUND = 50
USUAL = ("labels", "text", "easycache")


@pytest.fixture(autouse=True)
def _many_captures() -> Iterator[None]:
    """One twin sees all shapes, dtypes and kinds of timesteps."""
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=2048):
        yield


def drive(world: World, examples: int, shrinks: bool = True) -> None:
    """Play that many sequences, the same ones each time; the first failure is made small.

    They are drawn in rounds, each from the beginning: in a long one most are variants of a few.
    """
    phases = [Phase.generate, Phase.shrink] if shrinks else [Phase.generate]
    for begins in range(0, examples, ROUND):

        @seed(begins)
        @settings(
            max_examples=min(ROUND, examples - begins),
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


def world_of(name: str) -> World:
    kind, policy = WORLDS[name]
    return World(kind, **policy)


@pytest.mark.parametrize("examples", slow_but([ROUND], [ROUND, 2000], "it takes minutes"))
@pytest.mark.parametrize("name", slow_but(USUAL, WORLDS, "of gates, one is enough"))
def test_no_wrong_image_and_no_cache_left_out(name: str, examples: int) -> None:
    world = world_of(name)
    drive(world, examples)
    assert world.figures.sequences >= examples
    assert world.figures.share >= 0.95, str(world.figures)


IN_TURN = {count: tuple(at for at in range(count) for _ in range(8)) for count in (1, 2)}
ONCE_WRONG = {
    "Heun, guidance whose empty prompt is made anew": Sequence(
        (
            Sampling(("block", "main"), schedule="heun", guidance="third", negative="rebuilt"),
            Sampling(("block", "main"), schedule="heun", guidance="on", prompt="rebuilt", halves=3),
        ),
        IN_TURN[2],
    ),
    "Heun, two calls of a step with one prompt": Sequence(
        (Sampling(("block", "main"), schedule="heun", guidance="perturbed", first="uncond"),),
        IN_TURN[1],
    ),
    "labels made anew at steps of another schedule": Sequence(
        (
            Sampling(schedule="restart", named=True, batch=1),
            Sampling(schedule="heun", guidance="late", prompt="rebuilt", batch=1),
        ),
        IN_TURN[2],
        outer="one list",
    ),
    "Heun by its number of steps, another dtype and back": Sequence(
        (Sampling(("handle", "main"), told="number", schedule="heun", batch=1),),
        IN_TURN[1],
        ((1, "other dtype"), (2, "other dtype")),
    ),
    "Heun, another dtype and back": Sequence(
        (Sampling(("handle", "main"), schedule="heun", batch=1),),
        IN_TURN[1],
        ((1, "other dtype"), (2, "other dtype")),
    ),
    "Heun by its number of steps, another dtype and back, captions made anew": Sequence(
        (Sampling(("block", "thread"), told="number", schedule="heun", halves=1),),
        IN_TURN[1],
        ((2, "other dtype"), (3, "other dtype")),
    ),
    "Heun by its number of steps, another dtype and back to captions that are kept": Sequence(
        (
            Sampling(
                ("block", "thread"),
                told="number",
                schedule="heun",
                guidance="on",
                negative="pool 2",
                batch=1,
            ),
        ),
        IN_TURN[1],
        ((2, "other dtype"), (4, "other dtype")),
    ),
}


@pytest.mark.parametrize("name", ONCE_WRONG)
def test_what_was_wrong_once(name: str) -> None:
    world_of("skips" if "captions" in name else "labels").play(ONCE_WRONG[name])


class _Never:
    """An attribute that is False, whatever it is set to."""

    def __get__(self, *_: Any) -> bool:
        return False

    def __set__(self, *_: Any) -> None: ...


def _anything(*_: Any) -> str:
    return "same"


def _nothing(*_: Any) -> None: ...


def _false(*_: Any) -> bool:
    return False


PLANTED = {
    "all conditions are the same": lambda: patch.object(
        toca_fx.runtime.generations, "agreement", _anything
    ),
    "a generation never begins": lambda: patch.object(Progress, "turns_back", _false),
    "memories are never lost": lambda: patch.object(Progress, "lost", _Never()),
    "weights never change": lambda: patch.object(Seen, "differ", _false),
    "a pause is no gap": lambda: patch.object(Generations, "called", _nothing),
    "branches have no names": lambda: patch.object(
        toca_fx.backend, "current_place", lambda: Place(current_session())
    ),
    "histories go on over what was lost": lambda: patch.object(Storage, "forget_steps", _nothing),
    "threads are nobody's": lambda: patch.object(
        toca_fx.runtime.generations, "_is_foreign", _false
    ),
}

OF_HISTORIES = ("histories go on over what was lost",)


@pytest.mark.slow(reason="the driver itself is tested")
@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(fault: str) -> None:
    world = world_of("skips" if fault in OF_HISTORIES else "text")
    with PLANTED[fault]():
        try:
            drive(world, 500, shrinks=False)
        except WrongImageError:
            return
    assert world.figures.share < 0.95, str(world.figures)
