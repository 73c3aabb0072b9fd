"""Latency: whole runs, compiled, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

import toca_fx
from tools.frontier.measure import generate
from tools.frontier.peers import Cached
from tools.frontier.points import Point
from tools.frontier.setups import Denoiser, Setup

Contestant: TypeAlias = tuple[Point, Denoiser]


def compiled(setup: Setup, points: Sequence[Point]) -> list[Contestant]:
    """The points with their models, compiled as users would; uncached ones share one."""
    uncached: Denoiser = torch.compile(setup.model, fullgraph=True, dynamic=False)

    def of(point: Point) -> Denoiser:
        if point.peer is not None:
            scheduler = setup.samplers[point.sampler](point.timesteps)
            return Cached(setup, point.peer, scheduler, compiled=True)
        return uncached if point.source is None else toca_fx.compile(setup.model, point.source)

    return [(point, of(point)) for point in points]


def time_runs(
    setup: Setup,
    contestants: Sequence[Contestant],
    rounds: int,
    on_run: Callable[[], None] = lambda: None,
) -> list[tuple[float, float]]:
    """The seconds of each contestant, and its share of the first; medians over the rounds."""
    for point, denoiser in contestants:
        generate(setup, point, denoiser, seed=0)  # compiles every kind of step
        on_run()
    taken = [[0.0] * len(contestants) for _ in range(rounds)]
    for seconds in taken:
        for at, (point, denoiser) in enumerate(contestants):
            began = time.perf_counter()
            generate(setup, point, denoiser, seed=0)
            seconds[at] = time.perf_counter() - began
            on_run()
    return shares(taken)


def shares(taken: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Seconds and shares from the seconds by round and contestant.

    The machine's speed drifts: a run is compared with the first contestant's in its round. A
    contestant's seconds are its share of the median of the first.
    """
    usual = statistics.median(seconds[0] for seconds in taken)
    of_first = [
        statistics.median(seconds[at] / seconds[0] for seconds in taken)
        for at in range(len(taken[0]))
    ]
    return [(share * usual, share) for share in of_first]
