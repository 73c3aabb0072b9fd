"""The weights that steps read of a history, if a generation runs as it is planned."""

from __future__ import annotations

from collections.abc import Iterator

from toca_fx.plan.forecast import Times, weights
from toca_fx.plan.plan import Plan, Timeline
from toca_fx.plan.times import TIMESTEPS, time_of


def planned_weights(plan: Plan, timeline: Timeline) -> Iterator[tuple[int, Times]]:
    """The calls that read the history, with its weights, newest first.

    Which timesteps a sampler takes is not known ahead: they count as evenly spaced. Where a gate
    decides, as few steps are full as it may leave.
    """
    site, forecast = timeline.sites[0], timeline.forecast
    times = _even_times(plan, timeline)
    full: list[int] = []
    for call, step in enumerate(plan.fewest):
        mode = step.modes[site]
        if mode == "full":
            full.append(call)
        elif mode in ("reuse", "partial"):
            kept = tuple(times[one] for one in full[-plan.histories[site] :])
            yield call, weights(forecast, kept, times[call], call - full[-1], len(full))


def _even_times(plan: Plan, timeline: Timeline) -> list[float]:
    """By call, the time on the axis of the forecast."""
    # A policy names the noise where the axis needs it.
    kind, noise = timeline.forecast.time or "step", plan.settings.noise or "flow"
    total = len(plan.steps)
    # A flow begins at pure noise; the others, as DDIM, end at 0.
    left = [total - call - (noise != "flow") for call in range(total)]
    return [time_of(kind, call, TIMESTEPS * left[call] / total, noise) for call in range(total)]
