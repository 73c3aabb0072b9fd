"""What a policy with a gate gets wrong: what the gate cannot do, and keys that it leaves idle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from toca_fx.policy.check_steps import places_of
from toca_fx.policy.rules import Note
from toca_fx.policy.settings import WHOLE_GRAINS
from toca_fx.policy.types import Policy

_IDLE = ("drift", "growth", "phase", "windows")


def check_gate(policy: Policy, data: Mapping[str, Any]) -> Iterator[Note]:
    """Contradictions between the gate and the rest, and keys of `N` that have no effect beside it.

    Of forced full steps `N.first`, `N.last` and the lists are left.
    """
    if policy.gate is None or "signal" not in data["gate"]:
        return
    here = ("gate", "signal")
    if policy.gate.signal == "sea" and policy.sampler.noise is None:
        message = "`sea` needs `sampler.noise`, which says how noisy latents are at a timestep"
        yield Note(here, message)
    if policy.gate.signal == "surprise":
        yield from (Note(here, message) for message in _without_forecast(policy))
    if policy.skip == "alternate":
        message = (
            "`alternate` counts the steps to the next full one, and a gate decides on each as it "
            "comes: take `all`, or list the steps"
        )
        yield Note(("skip",), message)
    yield from _idle(policy, data)


def _without_forecast(policy: Policy) -> Iterator[str]:
    """Why nothing is forecast that a full step could be compared with."""
    if policy.cache.grain not in WHOLE_GRAINS and policy.skip == "none":
        yield (
            "`surprise` needs a memory of the whole model, which full steps are compared with: "
            "`cache.grain: model` or `output`, or `skip`"
        )
    forecast = policy.forecast
    longest = max(map(len, forecast.weights or ((),)))
    constant = longest < 2 if forecast.basis == "table" else forecast.order == 0
    if forecast.basis == "reuse" or constant:
        yield "`surprise` needs a `forecast` of order 1 or more: `{basis: newton}` is one"


def _idle(policy: Policy, data: Mapping[str, Any]) -> Iterator[Note]:
    """Keys that say when steps are full which the gate decides on."""
    for path, given in places_of("N", data):
        if "full_steps" in given:  # which replaces them
            continue
        bound = len(path) == 1 and "at_most" not in data["gate"]
        for name in (*_IDLE, *(() if bound else ("base",))):
            if name in given:
                message = f"`{name}` has no effect: `gate` decides which other steps are full"
                yield Note((*path, name), message, "warning", key=True)
