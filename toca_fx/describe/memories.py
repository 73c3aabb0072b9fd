"""What the units of a plan remember, and what is made of it, in words."""

from __future__ import annotations

from dataclasses import replace

from toca_fx.describe.site import Kept
from toca_fx.lower.analysis import Analysis
from toca_fx.plan.buffers import memory
from toca_fx.plan.forecast import amplification, order_of
from toca_fx.plan.plan import Plan
from toca_fx.plan.planned import planned_weights
from toca_fx.policy import Forecast

_GRAINS = {"state": "model", "output": "output"}
_SETTINGS = ("sigma", "ridge", "blend", "damping", "ignore")
_DEFAULTS: dict[str, dict[str, float]] = {"hermite": {"sigma": 0.5}, "chebyshev": {"ridge": 0.1}}
_NONE = ("ignore", 0)


def kept_by(found: Analysis, plan: Plan) -> dict[int, Kept]:
    """By site, what it remembers; sites without a memory are missing."""
    tensors = found.kept(plan)
    noise = _noise(plan)
    head = {i: run[0] for run in plan.runs for i in run}
    kept = {}
    for i in plan.cached:
        first = head.get(i, i)
        values = [tensors[buffer] for buffer in memory(first, plan.histories[first])]
        whole = _GRAINS.get(plan.sites[i].kind, "block" if i in head else "module")
        one = Kept(
            whole,
            len(values),
            tuple(values[0].shape),
            str(values[0].dtype).removeprefix("torch."),
            sum(value.nbytes for value in values) if first == i else 0,
            in_words(plan.policies[i].forecast, len(values)),
        )
        if first in noise:
            highest, at = noise[first]
            one = replace(one, noise=highest, noisiest=plan.steps[at].index)
        kept[i] = one
    return kept


def _noise(plan: Plan) -> dict[int, tuple[float, int]]:
    """By site with a history, the highest noise amplification and the call that has it."""
    found = {}
    for timeline in plan.timelines:
        of_calls = [(amplification(each), -call) for call, each in planned_weights(plan, timeline)]
        highest, call = max(of_calls, default=(1.0, 0))
        found.update(dict.fromkeys(timeline.sites, (highest, -call)))
    return found


def in_words(forecast: Forecast, history: int) -> str:
    """What is made of so many values: ``newton of order 2 by step``."""
    if history == 1 or forecast.basis == "reuse":
        return "the newest is reused"
    if forecast.basis == "table":
        return "forecast by a table of weights"
    axis = forecast.time or "step"
    said = [f"forecast by {forecast.basis} of order {order_of(forecast)} by {axis}"]
    given = {name: getattr(forecast, name) for name in _SETTINGS}
    settings = {name: value for name, value in given.items() if value is not None}
    settings = {**_DEFAULTS.get(forecast.basis, {}), **settings}
    said += [f"{name} {value:g}" for name, value in settings.items() if (name, value) != _NONE]
    return ", ".join(said)
