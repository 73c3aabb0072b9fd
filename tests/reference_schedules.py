"""Schedules, written to be read: which steps of a module are full, which run no block, and how many
tokens the others compute. Nothing is shared with toca_fx but the policy data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from toca_fx.policy import WHOLE_GRAINS, Interval, Policy, SitePolicy


def full_steps(interval: Interval, order: Sequence[int], total: int) -> set[int]:
    """The full steps of one module."""
    return _walk(interval, order, total)[0]


def skipped_steps(policy: Policy, order: Sequence[int], total: int) -> set[int]:
    """The steps between the full ones that run no block."""
    full, in_force = _walk(policy.N, order, total)
    others = [s for s in order if s not in full]
    if policy.cache.grain in WHOLE_GRAINS or policy.skip == "all":
        return set(others)
    if policy.skip == "none":
        return set()
    if policy.skip != "alternate":
        return set(others) & set(policy.skip)
    if in_force:  # as the authors count
        return {s for s in others if s % in_force[s] % 2 == 0}
    return {s for s in others if _to_next_full(s, order, full) % 2 == 0}


def _to_next_full(s: int, order: Sequence[int], full: set[int]) -> int:
    """How many steps there are to the next full one, or to the end of the generation."""
    for distance, later in enumerate(order[order.index(s) :]):
        if later in full:
            return distance
    return len(order) - order.index(s)


def _walk(interval: Interval, order: Sequence[int], total: int) -> tuple[set[int], dict[int, int]]:
    """The full steps, by walking through the generation as the authors' loop does; and where they
    are multiples of the interval in force, that by step.
    """
    first, last = interval.first, interval.last
    if isinstance(first, float):
        first = sum(1 for call in range(total) if call < round(first * total, 6))
    if isinstance(last, float):
        last = int(torch.tensor(last * total, dtype=torch.float64).round())
    forced = {*order[:first], *order[len(order) - last :], *interval.extra_full_steps}
    if interval.full_steps is not None:
        assert isinstance(interval.full_steps, tuple), "no other number of steps here"
        return {int(step) for step in interval.full_steps} | forced, {}
    grown = 0.0

    def interval_at(s: int) -> int:
        for window in interval.windows:
            if window.start <= s / total < window.stop:
                return window.interval
        base = math.floor(interval.base + grown)
        even = torch.tensor(
            round(base / (1 + interval.drift * (1 - 2 * s / total)), 9), dtype=torch.float64
        )
        return max(1, int(even.round()))

    full: set[int] = set()
    in_force: dict[int, int] = {}
    threshold, passed = 0, 0  # the interval in force; partial steps since the last full one
    for call, s in enumerate(order):
        if interval.phase in ("modulo", "due"):
            if call < first or s % threshold == 0:
                if interval.phase == "due":
                    full.add(s)
                threshold = interval_at(s)
                if s % threshold == 0:
                    full.add(s)
            in_force[s] = threshold
        elif s in forced or passed == threshold - 1:
            full.add(s)
            grown += interval.growth if call >= first else 0
            threshold, passed = interval_at(s), 0
        else:
            passed += 1
    return full | forced, in_force


def fresh_count(
    policy: SitePolicy, s: int, total: int, layer: int, last_layer: int, tokens: int
) -> int:
    """K = trunc(rho N) in single precision."""

    def slope(weight: float, at: float) -> float:
        """From 1 + weight at 0 to 1 - weight at 1."""
        return 1 + weight - 2 * weight * at

    span = policy.R.layer_span or max(last_layer, 1)
    share = (
        float(f"{1 - policy.R.base:.9f}")
        * slope(policy.R.layer_weight, layer / span)
        * slope(policy.R.step_weight, s / total)
    )
    rho = torch.tensor(share * policy.action.weight, dtype=torch.float32).clamp(0, 1)
    return int(rho * tokens)
